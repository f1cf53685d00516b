"""The chunked head against the float64 reference: both back ends, compiled or not."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmetal_distill.losses.chunked_head import Backend, HeadOptions, head_loss, head_rows
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.functional import divergence_loss, hard_cross_entropy
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.losses.plain import with_half_tail
from pmetal_distill.target import TargetKind
from tests import reference
from tests.pmetal_distill.head_cases import BACKENDS, PAIRS, Head, check, expected, run
from tests.pmetal_distill.loss_cases import KINDS, case_options, make_case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_every_loss_and_kind(kind: TargetKind, name: str, backend: Backend) -> None:
    case = make_case(kind, Divergence(name), vocab=150, k=7, num_tokens=9)
    head = Head.random(case, bias=True, scale=0.5, softcap=20.0)
    check(case, head, alpha=0.3, backend=backend, chunk_tokens=4)


@settings(max_examples=80)
@given(
    options=case_options(),
    backend=st.sampled_from(BACKENDS),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    chunk_tokens=st.integers(1, 10),
    bias=st.booleans(),
    scale=st.sampled_from([None, 0.25, 4.0]),
    softcap=st.sampled_from([None, 15.0]),
)
def test_any_head_size_mask_and_chunk(
    options: dict[str, Any],
    backend: Backend,
    alpha: float,
    chunk_tokens: int,
    bias: bool,
    scale: float | None,
    softcap: float | None,
) -> None:
    case = make_case(**options)
    head = Head.random(case, bias=bias, scale=scale, softcap=softcap)
    check(case, head, alpha=alpha, backend=backend, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_step_equals_the_plain_one(kind: TargetKind) -> None:
    case = make_case(kind, Divergence("jensen_shannon"), vocab=150, k=7, num_tokens=9)
    head = Head.random(case, bias=True, scale=None, softcap=None)
    check(case, head, alpha=0.5, chunk_tokens=4, compiled=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunked_equals_unchunked_losses_on_logits(kind: TargetKind, backend: Backend) -> None:
    case = make_case(kind, Divergence("forward_kl"), vocab=1500, k=7, num_tokens=40)
    head = Head.random(case, bias=False, scale=None, softcap=None)
    labels, mask = mx.array(case.labels), mx.array(case.mask)

    def unchunked(hidden: mx.array, weight: mx.array) -> mx.array:
        logits = hidden @ weight.T
        soft = divergence_loss(logits, case.target, divergence=case.divergence, temperature=2.0)
        hard = hard_cross_entropy(logits, mx.where(mask > 0, labels, -100))
        valid = ((labels != -100) * mask).sum()
        return 0.5 * 4 * (soft * mask).sum() / mask.sum() + 0.5 * hard.sum() / valid

    arrays = (mx.array(head.hidden), mx.array(head.weight))
    value, gradients = mx.value_and_grad(unchunked, argnums=(0, 1))(*arrays)
    parts, found = run(case, head, alpha=0.5, backend=backend, chunk_tokens=16)
    np.testing.assert_allclose(parts.total.item(), value.item(), rtol=1e-5)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, np.array(b), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_that_of_the_total_only_and_scales_with_its_cotangent(backend: Backend) -> None:
    case = make_case("bucket", Divergence(), vocab=50, k=7, num_tokens=5)
    head = Head.random(case, bias=False, scale=None, softcap=None)

    def scaled(factor: float, field: str) -> mx.array:
        def loss(hidden: mx.array) -> mx.array:
            parts = head_loss(
                hidden, HeadParts(mx.array(head.weight)), case.target.at(2.0), mx.array(case.labels),
                mx.array(case.mask), options=HeadOptions(backend=backend),
            )  # fmt: skip
            return factor * getattr(parts, field)

        return mx.grad(loss)(mx.array(head.hidden))

    assert mx.allclose(scaled(3.0, "total"), 3 * scaled(1.0, "total"), atol=1e-6)
    assert mx.abs(scaled(1.0, "soft")).max().item() == 0.0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_models(dtype: mx.Dtype, backend: Backend) -> None:
    case = make_case("sketch", Divergence(), vocab=300, k=7, num_tokens=20)
    head = Head.random(case, bias=True, scale=None, softcap=None)
    rounded = Head(
        *(
            np.array(mx.array(a).astype(dtype).astype(mx.float32))
            for a in (head.hidden, head.weight, head.bias)
        ),
        None,
        None,
    )

    def loss(hidden: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return head_loss(
            hidden, HeadParts(weight, bias), case.target.at(2.0), mx.array(case.labels), mx.array(case.mask),
            options=HeadOptions(backend=backend, chunk_tokens=7),
        ).total  # fmt: skip

    arrays = [mx.array(a).astype(dtype) for a in (rounded.hidden, rounded.weight, rounded.bias)]
    value, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    total, _, _, slopes = expected(case, rounded, 0.5)
    unit = 2**-10 if dtype == mx.float16 else 2**-7
    np.testing.assert_allclose(value.item(), total, rtol=2 * unit)
    for found, wanted in zip(gradients, slopes, strict=True):
        assert found.dtype == dtype
        close = np.abs(np.array(found.astype(mx.float32)) - wanted).max() / np.abs(wanted).max()
        assert close < 8 * unit


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_half_tail_keeps_its_digits_whatever_the_size_of_its_coordinates(size: float) -> None:
    soft = make_case("sketch", Divergence(), vocab=300, k=7, num_tokens=20).target.at(2.0)
    assert soft.coordinates is not None
    bases = tuple(replace(basis, components=basis.components / size) for basis in soft.bases)
    soft = replace(soft, bases=bases, coordinates=soft.coordinates * size)
    half, wanted = with_half_tail(soft).tail_logits(), np.array(soft.tail_logits())
    assert half.dtype == mx.float16
    assert np.abs(np.array(half.astype(mx.float32)) - wanted).max() < 2**-10 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_for_evaluation(kind: TargetKind, backend: Backend) -> None:
    case = make_case(kind, Divergence(), vocab=200, k=9, num_tokens=11, temperature=4.0)
    head = Head.random(case, bias=True, scale=None, softcap=10.0)
    assert head.bias is not None
    rows = head_rows(
        mx.array(head.hidden), head.parts(mx.array(head.weight), mx.array(head.bias)),
        [case.target.at(1.0), case.target.at(4.0)], mx.array(case.labels), mx.array(case.mask),
        options=HeadOptions(backend=backend, chunk_tokens=4),
    )  # fmt: skip
    logits, _ = head.logits()
    labels = np.where(case.mask > 0, case.labels, -100)
    assert rows.soft.shape == (2, 11)
    np.testing.assert_allclose(np.array(rows.soft[1]), case.soft(logits)[0] * case.mask, rtol=1e-5, atol=1e-6)
    hard = reference.hard_loss_and_gradient(logits, labels)[0]
    np.testing.assert_allclose(np.array(rows.hard), hard, rtol=1e-5, atol=1e-6)
    head_ids = case.target.head_ids
    best = case.events.argmax(axis=-1) if head_ids is None else np.array(head_ids[:, 0])
    for found, tokens, counts in (
        (rows.teacher_rank, best, case.mask > 0),
        (rows.label_rank, np.maximum(labels, 0), labels != -100),
    ):
        above = (logits > np.take_along_axis(logits, tokens[:, None], axis=-1)).sum(axis=-1)
        assert np.array_equal(np.array(found), above * counts)
    confidence = np.exp(reference.log_softmax(logits)).max(axis=-1) * case.mask
    np.testing.assert_allclose(np.array(rows.confidence), confidence, rtol=1e-5)
