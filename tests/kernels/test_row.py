"""Sums and gradient rows of one row of logits, under the emulation, against float64."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.kernels import row, tuning
from tests.kernels import tools
from tests.kernels.host.builder import Schedule


def _check(z: mx.array, k: int, temperature: float, schedule: Schedule, shape: tuning.Shape | None) -> None:
    n, vocab = z.shape
    ids = tools.head_ids(n, vocab, k)
    marked, b = tools.labels(n, vocab, ids), mx.array(1 / temperature)
    weights = [tools.vector(n, seed) for seed in (3, 4)]
    d_head, d_label = tools.vector(n, 5, k), tools.vector(n, 6)
    with tools.emulated(schedule, shape):
        sums = row.tail_sums(z, ids, marked, b)
        slope = row.tail_slope(z, ids, marked, b, weights=(*weights, sums.top), head=d_head, label=d_label)
    x, i, m = tools.float64(z), np.array(ids), np.array(marked)
    where = f"V={vocab} {z.dtype} T={temperature} {schedule} {shape}"
    tools.assert_close(sums.head, np.take_along_axis(x, i, -1), 0.0, where)
    at_label = np.where(m < 0, 0.0, x[np.arange(n), np.maximum(m, 0)])
    tools.assert_close(sums.label, at_label, 0.0, where)
    tail = tools.outside(x, i)
    top = tail.max(-1)
    tools.assert_close(sums.top, top, 0.0, where)
    rest = tail - top[:, None]
    tools.assert_close(sums.hard, tools.logsumexp(rest), 2e-6, where)
    tools.assert_close(sums.soft, tools.logsumexp(rest / temperature), 2e-6, where)
    wanted = _slope(rest, temperature, [tools.float64(w) for w in weights], i, m, d_head, d_label)
    tools.assert_gradient(slope, wanted, where)


def _slope(
    rest: Any,
    temperature: float,
    weights: list[Any],
    ids: Any,
    marked: Any,
    d_head: mx.array,
    d_label: mx.array,
) -> Any:
    wanted = weights[0][:, None] * np.exp(rest) + weights[1][:, None] * np.exp(rest / temperature)
    np.put_along_axis(wanted, ids, tools.float64(d_head), -1)
    has = marked >= 0
    wanted[np.flatnonzero(has), marked[has]] += tools.float64(d_label)[has]
    return wanted


@pytest.mark.parametrize("dtype", tools.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", tools.VOCABULARIES)
def test_sums_and_slopes_equal_float64(vocab: int, dtype: mx.Dtype) -> None:
    z = tools.logits(tools.rows_for(vocab), vocab, dtype)
    k = min(16, vocab - 2)
    for schedule, shape, temperature in zip(tools.SCHEDULES, tools.SHAPES, (1.0, 2.0, 4.0, 1.7), strict=True):
        _check(z, k, temperature, schedule, shape)


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 5, 7, None])
def test_any_alignment_gives_the_same(shift: int | None) -> None:
    for dtype in tools.DTYPES:
        _check(tools.logits(3, 1001, dtype), 5, 1.5, Schedule(2, shift), None)


@pytest.mark.parametrize("k", [0, 1, 64, 1000])
def test_any_head_size(k: int) -> None:
    _check(tools.logits(3, 1001, mx.float32), k, 2.0, Schedule(1, 0), None)


def test_a_vocabulary_too_large_for_a_bit_a_column_uses_coarser_bits() -> None:
    vocab = 262_144
    assert tuning.marks(vocab, 8, 16)[0] == tuning.COARSE_GRAIN
    _check(tools.logits(2, vocab, mx.bfloat16), 16, 2.0, Schedule(2, 1), None)


@pytest.mark.parametrize("temperature", [0.5, 0.125, 8.0, 100.0])
def test_extreme_temperatures(temperature: float) -> None:
    _check(tools.logits(4, 1023, mx.float32), 5, temperature, Schedule(3, 0), None)


def test_extreme_logits_lose_no_digits() -> None:
    rng = np.random.default_rng(8)
    z = rng.uniform(-1e4, 1e4, (4, 1023))
    z[1] = 1e4 + rng.standard_normal(1023)
    z[2] = -1e4 + rng.standard_normal(1023)
    z[3, :500] = -1e30
    _check(mx.array(z.astype(np.float32)), 5, 2.0, Schedule(0, 0), None)


def test_an_empty_tail_is_finite() -> None:
    z, ids = tools.logits(2, 7, mx.float32), tools.head_ids(2, 7, 7)
    with tools.emulated():
        sums = row.tail_sums(z, ids, mx.zeros((2,), mx.int32), mx.array(0.5))
    assert np.array(sums.top).tolist() == [np.float32(-1e30)] * 2
    assert np.isfinite(np.array(sums.soft)).all()
    assert np.isfinite(np.array(sums.hard)).all()


def test_nan_stays_visible() -> None:
    z = tools.float64(tools.logits(3, 1023, mx.float32))
    z[1, 700] = np.nan
    ids = mx.zeros((3, 0), mx.int32)
    with tools.emulated():
        sums = row.tail_sums(mx.array(z.astype(np.float32)), ids, mx.zeros((3,), mx.int32), mx.array(0.5))
    assert np.isnan(np.array(sums.soft)).tolist() == [False, True, False]
    assert np.isnan(np.array(sums.hard)).tolist() == [False, True, False]


def test_a_row_without_weight_is_zero_whatever_its_logits() -> None:
    z = mx.array(np.array([[np.nan] * 100, [1.0] * 100], np.float32))
    ids, zero = mx.array([[3, 5]] * 2), mx.zeros((2,))
    with tools.emulated():
        slope = row.tail_slope(
            z,
            ids,
            mx.zeros((2,), mx.int32),
            mx.array(1.0),
            weights=(zero, zero, zero),
            head=mx.zeros((2, 2)),
            label=zero,
        )
    assert not np.array(slope).any()


def test_small_and_empty_arrays_are_left_to_plain_operations() -> None:
    with tools.emulated():
        assert not row.usable(mx.zeros((1, 7)), 1)
        assert not row.usable(mx.zeros((0, 70)), 1)
        assert not row.usable(mx.zeros((2, 70), mx.int32), 1)
        assert row.usable(mx.zeros((2, 7)), 7)
    assert not row.usable(mx.zeros((2, 70)), 1)
