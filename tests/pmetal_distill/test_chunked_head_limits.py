"""The chunked head at its limits: NaN, no tokens, padding, wrong calls, memory."""

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.losses.chunked_head import Backend, HeadOptions, head_loss
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.target import TargetKind, TeacherTarget
from schemas.errors import IncompatibleError, UsageError
from tests.pmetal_distill.head_cases import BACKENDS, WIDTH, Head, run
from tests.pmetal_distill.loss_cases import KINDS, Case, make_case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_visible_where_a_token_counts_and_harmless_where_not(
    kind: TargetKind, backend: Backend
) -> None:
    case = make_case(kind, Divergence(), vocab=50, k=7, num_tokens=5)
    weight = mx.random.normal((50, 8), key=mx.random.key(0))
    hidden = mx.random.normal((5, 8), key=mx.random.key(1))
    mask = mx.array([1, 1, 0, 1, 1])

    def step(broken: int) -> tuple[mx.array, mx.array]:
        states = mx.where((mx.arange(5) == broken)[:, None], mx.nan, hidden)
        return mx.value_and_grad(
            lambda w: head_loss(
                states, HeadParts(w), case.target.at(2.0), mx.array(case.labels), mask,
                options=HeadOptions(backend=backend),
            ).total
        )(weight)  # fmt: skip

    value, gradient = step(1)
    assert np.isnan(value.item())
    assert np.isnan(np.array(gradient)).any()
    value, gradient = step(2)
    assert np.isfinite(value.item())
    assert np.isfinite(np.array(gradient)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_train_on_gives_zero(backend: Backend) -> None:
    case = make_case("sketch", Divergence(), vocab=50, k=7, num_tokens=5)
    head = Head.random(case, bias=False, scale=None, softcap=None)
    empty = Case(**{**case.__dict__, "mask": np.zeros(5, np.float32)})
    parts, gradients = run(empty, head, alpha=0.5, backend=backend)
    assert parts.total.item() == 0.0
    assert all(not g.any() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_parts_equal_the_whole(backend: Backend) -> None:
    case = make_case("sketch", Divergence(), vocab=50, k=7, num_tokens=10)
    head = Head.random(case, bias=False, scale=None, softcap=None)
    whole, gradients = run(case, head, alpha=0.5, backend=backend)
    counts, sums, total = (whole.num_soft, whole.num_hard), mx.zeros((50, WIDTH)), 0.0
    for index in (slice(0, 4), slice(4, 10)):
        part, gradient = mx.value_and_grad(
            lambda w, index=index: head_loss(
                mx.array(head.hidden[index]), HeadParts(w), case.target.at(2.0).tokens(index),
                mx.array(case.labels[index]), mx.array(case.mask[index]), counts=counts,
                options=HeadOptions(backend=backend),
            ).total
        )(mx.array(head.weight))  # fmt: skip
        total, sums = total + part.item(), sums + gradient
    assert total == pytest.approx(whole.total.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(sums), gradients[1], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_student_vocabulary_is_cut_to_the_teachers(backend: Backend) -> None:
    case = make_case("sketch", Divergence(), vocab=50, k=7, num_tokens=5)
    head = Head.random(case, bias=True, scale=None, softcap=None)
    _, wanted = run(case, head, alpha=0.5, backend=backend)
    assert head.bias is not None
    weight = np.pad(head.weight, ((0, 6), (0, 0)), constant_values=9.0)
    padded = Head(head.hidden, weight, np.pad(head.bias, (0, 6)), None, None)
    _, found = run(case, padded, alpha=0.5, backend=backend)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)
    np.testing.assert_allclose(found[1][:50], wanted[1], atol=1e-6)
    assert not found[1][50:].any()
    with pytest.raises(IncompatibleError, match="it has 50, the student 49"):
        head_loss(
            mx.array(head.hidden), HeadParts(mx.array(head.weight[:49])), case.target.at(2.0),
            mx.array(case.labels), mx.array(case.mask),
        )  # fmt: skip


def test_wrong_calls_are_refused() -> None:
    case = make_case("none", Divergence(), vocab=50, k=7, num_tokens=5)
    head, hidden = HeadParts(mx.zeros((50, 4))), mx.zeros((5, 4))
    soft, labels, mask = case.target.at(2.0), mx.array(case.labels), mx.array(case.mask)
    with pytest.raises(UsageError, match="reverse_kl needs the teacher's whole distribution"):
        head_loss(hidden, head, soft, labels, mask, divergence=Divergence("reverse_kl"))
    with pytest.raises(IncompatibleError, match=r"found \(5, 5, 5, 4\)"):
        head_loss(hidden, head, soft, labels, mask[:4])
    with pytest.raises(UsageError, match="chunk_tokens must be at least 1, found 0"):
        HeadOptions(chunk_tokens=0)
    with pytest.raises(UsageError, match=r"outside mx\.compile only"):
        mx.compile(
            lambda h: head_loss(h, head, soft, labels, mask, options=HeadOptions(backend="host")).total
        )(hidden)


def test_environment_forces_plain_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    from pmetal_distill.losses.chunked_head import choose_backend

    assert choose_backend(mx.zeros((1, 1)), "auto") == "host"
    monkeypatch.setenv("PMETAL_KERNELS", "plain")
    assert choose_backend(mx.zeros((1, 1)), "auto") == "plain"


@pytest.mark.parametrize(("backend", "compiled"), [("host", False), ("plain", False), ("plain", True)])
@pytest.mark.parametrize("kind", ["bucket", "sketch"])
def test_peak_memory_does_not_grow_with_tokens(kind: TargetKind, backend: Backend, compiled: bool) -> None:
    def peak(num_tokens: int) -> int:
        case = make_case(kind, Divergence(), vocab=4096, k=4, num_tokens=num_tokens)
        hidden, weight = mx.random.normal((num_tokens, 2)), mx.random.normal((4096, 2))
        soft, labels, mask = case.target.at(2.0), mx.array(case.labels), mx.array(case.mask)
        options = HeadOptions(chunk_tokens=32, backend=backend)
        step = mx.value_and_grad(
            lambda h, w: head_loss(h, HeadParts(w), soft, labels, mask, options=options).total, argnums=(0, 1)
        )
        step = mx.compile(step) if compiled else step
        mx.eval(hidden, weight, soft.arrays(), labels, mask, step(hidden, weight))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        tracemalloc.start()
        mx.eval(step(hidden, weight))
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return int(mx.get_peak_memory() - before + numpy_peak)

    assert peak(512) <= 1.1 * peak(128)


def test_dense_targets_are_not_overwritten() -> None:
    logits = mx.random.normal((5, 50), key=mx.random.key(0))
    before = np.array(logits)
    target = TeacherTarget.dense(logits).at(2.0)
    head_loss(
        mx.random.normal((5, 4)), HeadParts(mx.random.normal((50, 4))), target, mx.zeros(5, mx.int32),
        mx.ones(5), options=HeadOptions(backend="host"),
    )  # fmt: skip
    assert np.array_equal(np.array(logits), before)


def test_row_functions_follow_the_device() -> None:
    from pmetal_distill.kernels import dispatch, ops
    from pmetal_distill.losses.chunk import PLAIN_OPS, row_ops

    assert row_ops() is PLAIN_OPS
    with dispatch.using(dispatch.METAL):
        assert row_ops() is ops


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_at_all(kind: TargetKind, backend: Backend) -> None:
    case = make_case(kind, Divergence(), vocab=50, k=7, num_tokens=3)
    target = case.target.at(2.0).tokens(slice(0, 0))
    value, gradient = mx.value_and_grad(
        lambda w: head_loss(
            mx.zeros((0, 4)), HeadParts(w), target, mx.zeros(0, mx.int32), mx.zeros(0),
            options=HeadOptions(backend=backend),
        ).total
    )(mx.zeros((50, 4)))  # fmt: skip
    assert value.item() == 0.0
    assert not np.array(gradient).any()


def test_chunks_are_few_and_even() -> None:
    from pmetal_distill.losses.plain import token_slices

    assert [(s.start, s.stop) for s in token_slices(10, 4)] == [(0, 3), (3, 6), (6, 10)]
    assert [(s.start, s.stop) for s in token_slices(8, 8)] == [(0, 8)]
