"""Hidden-state losses against NumPy in float64, and the pairing of layers."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmetal_distill.losses.hidden import HiddenAligner, HiddenStateLoss, layer_pairs
from schemas.errors import IncompatibleError, UsageError

KINDS = tuple(HiddenStateLoss)


def reference(kind: HiddenStateLoss, s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Distance of each token, float64."""
    s, t = s.astype(np.float64), t.astype(np.float64)
    if kind is HiddenStateLoss.MSE:
        return ((s - t) ** 2).mean(axis=-1)
    norms = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
    return 1 - (s * t).sum(axis=-1) / norms


def slope(kind: HiddenStateLoss, s: np.ndarray, t: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Finite differences of the masked mean, float64."""
    out, h = np.zeros(s.shape), 1e-6
    for index in np.ndindex(s.shape):
        step = np.zeros(s.shape)
        step[index] = h
        out[index] = (
            ((reference(kind, s + step, t) - reference(kind, s - step, t)) * mask).sum()
            / (2 * h)
            / mask.sum()
        )
    return out


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 9)),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(kind: HiddenStateLoss, shape: tuple[int, ...], size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    s, t = ((rng.standard_normal(shape) * size).astype(np.float32) for _ in range(2))
    mask = (rng.random(shape[:-1]) < 0.7).astype(np.float32)
    mask[0, 0] = 1
    value, gradient = mx.value_and_grad(lambda x: kind.mean(x, mx.array(t), mx.array(mask)))(mx.array(s))
    np.testing.assert_allclose(
        value.item(), (reference(kind, s, t) * mask).sum() / mask.sum(), rtol=1e-5, atol=1e-6
    )
    unit = size if kind is HiddenStateLoss.MSE else 1 / size
    expected = slope(kind, s.astype(np.float64) / size, t.astype(np.float64) / size, mask) * unit
    np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-4, atol=1e-5 * unit)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_reduced_in_float32(kind: HiddenStateLoss, dtype: mx.Dtype) -> None:
    s, t = ((mx.random.normal((3, 2048), key=mx.random.key(i)) * 100).astype(dtype) for i in range(2))
    expected = reference(kind, *(np.array(a.astype(mx.float32)) for a in (s, t)))
    np.testing.assert_allclose(np.array(kind.per_token(s, t)), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_where_equal_and_safe_at_zero(kind: HiddenStateLoss) -> None:
    states = mx.random.normal((4, 16), key=mx.random.key(0))
    assert mx.abs(kind.per_token(states, states)).max().item() < 1e-6
    value, gradient = mx.value_and_grad(lambda x: kind.per_token(x, states).sum())(mx.zeros((4, 16)))
    assert np.isfinite(value.item())
    assert np.isfinite(np.array(gradient)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_do_not_count_and_nan_is_visible(kind: HiddenStateLoss) -> None:
    teacher = mx.random.normal((2, 8), key=mx.random.key(0))
    student = mx.random.normal((2, 8), key=mx.random.key(1))
    broken = mx.where(mx.array([[False], [True]]), mx.nan, student)
    alone = kind.mean(student[:1], teacher[:1], mx.ones(1))
    assert kind.mean(broken, teacher, mx.array([1, 0])).item() == pytest.approx(alone.item(), rel=1e-6)
    assert np.isnan(kind.mean(broken, teacher, mx.array([1, 1])).item())
    assert kind.mean(student, teacher, mx.zeros(2)).item() == 0.0


def test_projection_learns_when_widths_differ() -> None:
    mx.random.seed(0)
    aligner = HiddenAligner(HiddenStateLoss.MSE, [(3, 1), (7, 3)], teacher_width=12, student_width=8)
    student = {i: mx.random.normal((2, 5, 8)) for i in (1, 3)}
    teacher = {i: mx.random.normal((2, 5, 12)) for i in (3, 7)}
    value, gradients = nn.value_and_grad(aligner, lambda m: m(student, teacher, mx.ones((2, 5))))(aligner)
    by_hand = [
        ((np.array(student[b]) @ np.array(p.weight).T - np.array(teacher[a])) ** 2).mean()
        for (a, b), p in zip(aligner.pairs, aligner.projections, strict=True)
    ]
    assert value.item() == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert all(mx.abs(g["weight"]).max().item() > 0 for g in gradients["projections"])
    same = HiddenAligner(HiddenStateLoss.COSINE, [(0, 0)], teacher_width=8, student_width=8)
    assert not same.trainable_parameters().get("projections")


def test_layer_pairs_by_depth_or_as_given() -> None:
    sizes = {"num_teacher_layers": 30, "num_student_layers": 10}
    assert layer_pairs([2, 14, -1], **sizes) == [(2, 0), (14, 4), (29, 9)]
    assert layer_pairs([0], **sizes) == [(0, 0)]
    assert layer_pairs([5, 6], student_layers=[-1, 0], **sizes) == [(5, 9), (6, 0)]
    with pytest.raises(UsageError, match="the teacher has layers -30 to 29, found 30"):
        layer_pairs([30], **sizes)
    with pytest.raises(UsageError, match="for each of the 2 hidden_layers, found 1"):
        layer_pairs([5, 6], student_layers=[1], **sizes)


def test_missing_layers_and_widths_are_named() -> None:
    aligner = HiddenAligner(HiddenStateLoss.MSE, [(3, 1)], teacher_width=8, student_width=8)
    states = mx.zeros((1, 2, 8))
    with pytest.raises(IncompatibleError, match="teacher layer 3 and student layer 1 are needed, found"):
        aligner({1: states}, {2: states}, mx.ones((1, 2)))
    with pytest.raises(IncompatibleError, match="must have equal shapes"):
        aligner({1: states}, {3: mx.zeros((1, 2, 9))}, mx.ones((1, 2)))
    with pytest.raises(UsageError, match="at least one layer"):
        HiddenAligner(HiddenStateLoss.MSE, [], teacher_width=8, student_width=8)
