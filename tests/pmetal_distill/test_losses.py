"""The losses on logits against the float64 reference: every loss and kind of target, values and gradients."""

import runpy
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from beartype import beartype
from hypothesis import given, settings
from jaxtyping import TypeCheckError, jaxtyped

from pmetal_distill.losses import functional
from pmetal_distill.losses.divergences import LOSS_NAMES, Divergence
from pmetal_distill.losses.functional import divergence_loss, hard_cross_entropy
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TargetKind, TeacherTarget
from schemas.errors import IncompatibleError, UsageError
from tests import reference
from tests.pmetal_distill.loss_cases import (
    KINDS,
    Case,
    assert_close,
    case_options,
    make_case,
    make_target,
    smooth,
)

PAIRS = [(k, n) for k in KINDS for n in LOSS_NAMES if not (k == "none" and n == "reverse_kl")]


def value_and_gradient(case: Case, logits: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Through the real function and MLX's autodiff; the gradient of the sum over tokens."""

    def per_token(x: mx.array) -> mx.array:
        return divergence_loss(x, case.target, divergence=case.divergence, temperature=case.temperature)

    gradient = mx.grad(lambda x: per_token(x).sum())(logits)
    assert gradient.dtype == logits.dtype
    return np.array(per_token(logits)), np.array(gradient.astype(mx.float32))


@settings(max_examples=150)
@given(case_options())
def test_value_and_gradient_equal_the_reference(options: dict[str, Any]) -> None:
    case = make_case(**options)
    value, gradient = value_and_gradient(case, mx.array(case.student))
    expected, slope = case.soft()
    assert_close(value, expected)
    assert np.isfinite(gradient).all()
    if smooth(case):  # the gradient of a divergence D is a difference of terms of the size of D
        assert_close(gradient, slope, relative=1e-4, absolute=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_half_precision_logits_are_reduced_in_float32(kind: TargetKind, name: str, dtype: mx.Dtype) -> None:
    case = make_case(kind, Divergence(name), vocab=321, k=9)
    logits = mx.array(case.student).astype(dtype)
    value, gradient = value_and_gradient(case, logits)
    expected, slope = case.soft(np.array(logits.astype(mx.float32)))
    assert_close(value, expected)
    unit = 2**-10 if dtype == mx.float16 else 2**-7
    assert_close(gradient, slope, relative=unit, absolute=1e-6)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_gradient_equals_finite_differences(kind: TargetKind, name: str) -> None:
    case = make_case(kind, Divergence(name), vocab=13, k=4, num_tokens=2, temperature=1.7)
    _, gradient = value_and_gradient(case, mx.array(case.student))
    x, h = case.student.astype(np.float64), 1e-5
    for column in range(x.shape[1]):
        step = np.zeros_like(x)
        step[:, column] = h
        difference = (case.soft(x + step)[0] - case.soft(x - step)[0]) / (2 * h)
        np.testing.assert_allclose(
            gradient[:, column], difference, atol=1e-4 * max(1, np.abs(difference).max())
        )


@pytest.mark.parametrize("name", [n for n in LOSS_NAMES if n != "soft_cross_entropy"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_zero_where_student_is_teacher(name: str, temperature: float) -> None:
    logits = mx.array(np.random.default_rng(0).standard_normal((4, 500)).astype(np.float32) * 4)
    target = TeacherTarget.dense(logits)
    value, gradient = mx.value_and_grad(
        lambda x: divergence_loss(x, target, divergence=Divergence(name), temperature=temperature).sum()
    )(logits)
    assert abs(value.item()) < 2e-6
    if name != "total_variation":  # not differentiable there
        assert mx.abs(gradient).max().item() < 1e-6


@settings(max_examples=30)
@given(case_options(kinds=("bucket",), styles=("normal", "ties", "flat")))
def test_bucket_is_a_lower_bound_of_dense(options: dict[str, Any]) -> None:
    case = make_case(**options)
    forward = Divergence("forward_kl")
    rng = np.random.default_rng(3)
    teacher = rng.standard_normal(case.student.shape).astype(np.float32) * 3
    target, _, _ = make_target("bucket", teacher, k=9, temperature=1.0, rng=rng)
    dense = TeacherTarget.dense(mx.array(teacher))
    student = mx.array(case.student)
    low = divergence_loss(student, target, divergence=forward, temperature=1.0)
    high = divergence_loss(student, dense, divergence=forward, temperature=1.0)
    assert (low <= high * (1 + 1e-5) + 1e-5).all().item()


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_full_rank_sketch_equals_dense(name: str, temperature: float) -> None:
    rng = np.random.default_rng(1)
    teacher, student = (rng.standard_normal((3, 90)).astype(np.float32) * 3 for _ in range(2))
    case = make_case("bucket", Divergence(name), vocab=90, k=8)
    bucket, _, _ = make_target("bucket", teacher, k=8, temperature=temperature, rng=rng)
    mean = teacher.mean(axis=0)
    assert bucket.head_ids is not None
    assert bucket.head_logprobs is not None
    assert bucket.tail_curve is not None
    assert bucket.curve is not None
    target = TeacherTarget.sketch(
        bucket.head_ids, bucket.head_logprobs, bucket.tail_curve, mx.array(teacher - mean),
        curve=bucket.curve, bases=[TailBasis(mx.array(mean), mx.eye(90))],
    )  # fmt: skip
    losses = [
        mx.value_and_grad(
            lambda x, t=t: divergence_loss(x, t, divergence=case.divergence, temperature=temperature).sum()
        )(mx.array(student))
        for t in (target, TeacherTarget.dense(mx.array(teacher)))
    ]
    (sketch, sketch_gradient), (dense, dense_gradient) = losses
    np.testing.assert_allclose(sketch.item(), dense.item(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(sketch_gradient), np.array(dense_gradient), atol=1e-4)


def test_none_over_the_whole_vocabulary_equals_dense() -> None:
    case = make_case("none", Divergence("forward_kl"), vocab=40, k=40)
    dense = make_case("dense", Divergence("forward_kl"), vocab=40, k=40)
    found, slope = value_and_gradient(case, mx.array(case.student))
    expected, expected_slope = value_and_gradient(dense, mx.array(case.student))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_nan_in_the_student_stays_visible(kind: TargetKind, name: str) -> None:
    if (kind, name) not in PAIRS:
        return
    case = make_case(kind, Divergence(name), vocab=50, k=5)
    logits = case.student.copy()
    logits[1, 49] = np.nan
    value, gradient = value_and_gradient(case, mx.array(logits))
    assert np.isnan(value).tolist() == [False, True, False]
    assert np.isnan(gradient).any(axis=-1).tolist() == [False, True, False]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_largest_finite_logits_give_finite_losses(kind: TargetKind, name: str) -> None:
    case = make_case(kind, Divergence(name), vocab=50, k=5)
    logits = np.where(case.student > 0, np.float32(3e38), np.float32(-3e38))
    value, gradient = value_and_gradient(case, mx.array(logits))
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


def test_leading_axes_are_free_and_shapes_are_checked() -> None:
    case = make_case("bucket", Divergence("forward_kl"), vocab=50, k=5, num_tokens=6)
    logits = mx.array(case.student)
    flat = functional.forward_kl(logits, case.target, temperature=2.0)
    assert functional.forward_kl(logits.reshape(2, 3, 50), case.target, temperature=2.0).shape == (2, 3)
    assert mx.array_equal(
        functional.forward_kl(logits.reshape(2, 3, 50), case.target, temperature=2.0).reshape(-1), flat
    )
    with pytest.raises(IncompatibleError, match=r"\(6, 50\).*found \(6, 49\)"):
        functional.forward_kl(logits[:, :49], case.target, temperature=2.0)


def test_named_functions_are_the_named_divergences() -> None:
    case = make_case("sketch", Divergence("forward_kl"), vocab=50, k=5)
    logits, at = mx.array(case.student), {"temperature": 3.0}
    named = {
        "forward_kl": functional.forward_kl(logits, case.target, **at),
        "reverse_kl": functional.reverse_kl(logits, case.target, **at),
        "jensen_shannon": functional.jensen_shannon(logits, case.target, beta=0.3, **at),
        "soft_cross_entropy": functional.soft_cross_entropy(logits, case.target, **at),
        "total_variation": functional.total_variation(logits, case.target, **at),
        "skewed_forward_kl": functional.skewed_kl(logits, case.target, skew=0.3, **at),
        "skewed_reverse_kl": functional.skewed_kl(logits, case.target, skew=0.3, reverse=True, **at),
    }
    assert set(named) == set(LOSS_NAMES)
    for name, value in named.items():
        expected = divergence_loss(logits, case.target, divergence=Divergence(name, 0.3), **at)
        assert mx.array_equal(value, expected), name


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_hard_cross_entropy(dtype: mx.Dtype) -> None:
    case = make_case("dense", Divergence("forward_kl"), vocab=77, k=5, num_tokens=9, student_style="huge")
    logits = mx.array(case.student - 1e4).astype(dtype)
    labels = mx.array(case.labels)
    expected, slope = reference.hard_loss_and_gradient(np.array(logits.astype(mx.float32)), case.labels)
    value = hard_cross_entropy(logits, labels)
    gradient = mx.grad(lambda x: hard_cross_entropy(x, labels).sum())(logits)
    assert_close(np.array(value), expected)
    np.testing.assert_allclose(np.array(gradient.astype(mx.float32)), slope, atol=1e-6, rtol=2**-7)


def test_meaningless_or_wrong_requests_are_refused_with_the_reason() -> None:
    case = make_case("none", Divergence("forward_kl"), vocab=50, k=5)
    logits = mx.array(case.student)
    with pytest.raises(UsageError, match="probability 0 outside its head"):
        functional.reverse_kl(logits, case.target, temperature=1.0)
    with pytest.raises(UsageError, match="temperature must be a positive number, found 0"):
        functional.forward_kl(logits, case.target, temperature=0)
    with pytest.raises(UsageError, match="beta must lie strictly between 0 and 1"):
        functional.jensen_shannon(logits, case.target, temperature=1.0, beta=1.0)
    with pytest.raises(UsageError, match=r"loss must be one of forward_kl, .*found 'kl'"):
        Divergence("kl")


def test_signatures_state_the_shapes() -> None:
    case = make_case("bucket", Divergence("forward_kl"), vocab=50, k=5, num_tokens=6)
    checked = jaxtyped(typechecker=beartype)(functional.forward_kl)
    assert checked(mx.array(case.student), case.target, temperature=2.0).shape == (6,)
    with pytest.raises(TypeCheckError):
        checked(mx.array(case.labels), case.target, temperature=2.0)
    labelled = jaxtyped(typechecker=beartype)(hard_cross_entropy)
    with pytest.raises(TypeCheckError):
        labelled(mx.array(case.student), mx.array(case.labels[:5]))


def test_shapes_need_no_jaxtyping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jaxtyping", None)
    from pmetal_distill.losses import shapes as module

    shapes = runpy.run_path(str(module.__file__))
    assert shapes["Float"][mx.array, "tokens vocab"] is mx.array
