"""Sums, divergences and gradient rows of a student's and a teacher's row, emulated, against float64."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.kernels import pair, tuning
from tests.kernels import tools
from tests.kernels.host.builder import Schedule

MIXTURES: tuple[pair.Weights | None, ...] = ((0.3, 0.7, 0.3), (1.0, 0.0, 0.1), (0.0, 1.0, 0.9), None)


def _inputs(vocab: int, dtype: mx.Dtype, teacher: mx.Dtype, k: int) -> tuple[mx.array, ...]:
    n = tools.rows_for(vocab)
    ids = tools.head_ids(n, vocab, k)
    z, t = tools.logits(n, vocab, dtype), tools.logits(n, vocab, teacher, seed=9)
    return z, t, ids, tools.labels(n, vocab, ids)


def _tail(array: mx.array, ids: mx.array) -> tuple[Any, Any]:
    tail = tools.outside(tools.float64(array), np.array(ids))
    top = tail.max(-1)
    return tail - top[:, None], top


def _mean(weights: Any, values: Any) -> Any:
    return np.where(weights > 0, weights * np.where(weights > 0, values, 0.0), 0.0).sum(-1) / weights.sum(-1)


def _check_sums(inputs: tuple[mx.array, ...], temperature: float, where: str, bound: float = 4e-6) -> None:
    z, t, ids, marked = inputs
    sums, other = pair.pair_sums(z, t, ids, marked, mx.array(1 / temperature), reverse=True)
    (x, x_top), (y, y_top) = _tail(z, ids), _tail(t, ids)
    p, q = np.exp(y / temperature), np.exp(x / temperature)
    with np.errstate(invalid="ignore"):
        gap = y - x
    for name, found, wanted in (
        ("top", sums.top, x_top),
        ("hard", sums.hard, tools.logsumexp(x)),
        ("soft", sums.soft, tools.logsumexp(x / temperature)),
        ("teacher's top", other.top, y_top),
        ("teacher's soft", other.soft, tools.logsumexp(y / temperature)),
        ("mean", other.mean, _mean(p, y)),
        ("forward", other.forward_gap, _mean(p, gap)),
        ("reverse", other.reverse_gap, _mean(q, -gap)),
    ):
        tools.assert_close(found, wanted, bound, f"{where} {name}")


def _norms(inputs: tuple[mx.array, ...], temperature: float) -> pair.PairNorms:
    found = []
    for array in inputs[:2]:
        rest, top = _tail(array, inputs[2])
        found += [top, -tools.logsumexp(rest / temperature) - 0.2]
    return pair.PairNorms(*(mx.array(a.astype(np.float32)) for a in found))


def _terms(x: Any, y: Any, norms: pair.PairNorms, temperature: float, weights: pair.Weights | None) -> Any:
    lq = x / temperature + tools.float64(norms.student_offset)[:, None]
    lp = y / temperature + tools.float64(norms.teacher_offset)[:, None]
    p, q = np.exp(lp), np.exp(lq)
    if weights is None:
        return 0.5 * np.abs(p - q), 0.5 * q * np.sign(q - p)
    a, b, share = weights
    inside = np.isfinite(lp)
    lp, lq = np.where(inside, lp, 0.0), np.where(inside, lq, 0.0)
    lm = np.logaddexp(np.log(share) + lp, np.log(1 - share) + lq)
    part = (1 - share) * np.exp(lq - lm)
    value = a * p * (lp - lm) + b * q * (lq - lm)
    return value, b * q * (lq - lm + 1 - part) - a * p * part


def _check_terms(
    inputs: tuple[mx.array, ...], temperature: float, weights: pair.Weights | None, where: str
) -> None:
    z, t, ids, marked = inputs
    n, k, b = len(z), ids.shape[-1], mx.array(1 / temperature)
    norms = _norms(inputs, temperature)
    value, slope = pair.pair_divergence(z, t, ids, b, norms, weights=weights)
    (x, _), (y, _) = _tail(z, ids), _tail(t, ids)
    values, slopes = _terms(x, y, norms, temperature, weights)
    tools.assert_close(value, values.sum(-1), 5e-6, f"{where} value")
    tools.assert_close(slope, slopes.sum(-1), 5e-6, f"{where} slope")
    hard, soft, term = (tools.vector(n, seed) for seed in (3, 4, 5))
    d_head, d_label = tools.vector(n, 6, k), tools.vector(n, 7)
    found = pair.pair_slope(
        z,
        t,
        ids,
        marked,
        b,
        norms,
        pair.PairWeights(hard, soft, term=term),
        divergence=weights,
        head=d_head,
        label=d_label,
    )
    h, s, w = (tools.float64(a)[:, None] for a in (hard, soft, term))
    wanted = h * np.exp(x) + s * np.exp(x / temperature) + w * slopes
    _check_slope(found, wanted, inputs, d_head, d_label, f"{where} gradient")


def _check_gap(inputs: tuple[mx.array, ...], temperature: float, gap: bool, where: str) -> None:
    z, t, ids, marked = inputs
    n, k = len(z), ids.shape[-1]
    hard, soft, teacher, by_gap = (tools.vector(n, seed) for seed in (3, 4, 5, 8))
    d_head, d_label = tools.vector(n, 6, k), tools.vector(n, 7)
    weights = pair.PairWeights(hard, soft, gap=by_gap if gap else None, teacher=teacher)
    found = pair.pair_slope(
        z,
        t,
        ids,
        marked,
        mx.array(1 / temperature),
        _norms(inputs, temperature),
        weights,
        divergence=None,
        head=d_head,
        label=d_label,
    )
    (x, _), (y, _) = _tail(z, ids), _tail(t, ids)
    h, s, w, g = (tools.float64(a)[:, None] for a in (hard, soft, teacher, by_gap))
    with np.errstate(invalid="ignore"):
        difference = np.where(np.isfinite(x), x - y, 0.0)
    factor = s + g * difference if gap else s
    wanted = h * np.exp(x) + factor * np.exp(x / temperature) + w * np.exp(y / temperature)
    _check_slope(found, wanted, inputs, d_head, d_label, where)


def _check_slope(
    found: mx.array,
    wanted: Any,
    inputs: tuple[mx.array, ...],
    d_head: mx.array,
    d_label: mx.array,
    where: str,
) -> None:
    ids, marked = np.array(inputs[2]), np.array(inputs[3])
    np.put_along_axis(wanted, ids, tools.float64(d_head), -1)
    has = marked >= 0
    wanted[np.flatnonzero(has), marked[has]] += tools.float64(d_label)[has]
    scale = np.abs(wanted).max(axis=-1, keepdims=True)
    error = (np.abs(tools.float64(found) - wanted) / scale).max()
    assert error <= 4 * tools.GRAIN[found.dtype], f"{where}: off by {error} of the row's largest entry"


@pytest.mark.parametrize("dtype", tools.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", tools.VOCABULARIES)
def test_everything_equals_float64(vocab: int, dtype: mx.Dtype) -> None:
    inputs = _inputs(vocab, dtype, mx.float32, min(16, vocab - 2))
    temperatures = (1.0, 2.0, 1.7, 4.0)
    shapes = [tuning.Shape(s.threads, 1) for s in tools.SHAPES]
    for schedule, shape, temperature, mixture in zip(
        tools.SCHEDULES, shapes, temperatures, MIXTURES, strict=True
    ):
        where = f"V={vocab} {dtype} T={temperature} {schedule} {shape}"
        with tools.emulated(schedule, shape):
            _check_sums(inputs, temperature, where)
            _check_terms(inputs, temperature, mixture, where)
            _check_gap(inputs, temperature, schedule.order % 2 == 0, where)


@pytest.mark.parametrize("shift", [0, 1, 3, None])
def test_rows_aligned_differently_are_read_one_by_one(shift: int | None) -> None:
    inputs = _inputs(1001, mx.bfloat16, mx.float32, 5)
    with tools.emulated(Schedule(2, shift), tuning.Shape(96, 2)):
        _check_sums(inputs, 2.0, "")
        _check_gap(inputs, 2.0, True, "")


def test_without_a_head() -> None:
    inputs = _inputs(1025, mx.float32, mx.bfloat16, 0)
    with tools.emulated():
        _check_sums(inputs, 2.0, "")
        _check_terms(inputs, 2.0, (0.5, 0.5, 0.5), "")


def test_a_common_offset_costs_no_digits() -> None:
    z, _, ids, marked = _inputs(1025, mx.float32, mx.float32, 8)
    with tools.emulated():
        _, plain = pair.pair_sums(z, z, ids, marked, mx.array(0.5), reverse=True)
        _, other = pair.pair_sums(z, z + 4096.0, ids, marked, mx.array(0.5), reverse=True)
    assert not np.array(plain.forward_gap).any()
    assert not np.array(plain.reverse_gap).any()
    assert np.abs(np.array(other.forward_gap)).max() < 3e-4  # adding 4096 rounds to multiples of 1/2048
    assert np.abs(np.array(other.reverse_gap)).max() < 3e-4


def test_extreme_logits_stay_finite() -> None:
    rng = np.random.default_rng(3)
    z, t = (mx.array(rng.uniform(-1e4, 1e4, (3, 1023)).astype(np.float32)) for _ in range(2))
    ids = tools.head_ids(3, 1023, 4)
    inputs = (z, t, ids, tools.labels(3, 1023, ids))
    with tools.emulated():
        for mixture in MIXTURES:
            _check_terms(inputs, 2.0, mixture, "extreme")
        _check_sums(inputs, 2.0, "extreme", bound=1e-3)  # neighbours of 1e4 lie that far apart


@pytest.mark.parametrize("dtype", tools.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [7, 1025, 5000])
def test_a_ceiling_counts_as_a_teacher_that_was_cut_before(vocab: int, dtype: mx.Dtype) -> None:
    z, t, ids, marked = _inputs(vocab, dtype, dtype, min(5, vocab - 2))
    ceiling = mx.array(np.quantile(tools.float64(t), 0.8, axis=-1).astype(np.float32)).astype(dtype)
    cut = mx.minimum(t, ceiling[:, None])
    assert not mx.array_equal(cut, t)
    norms = _norms((z, cut, ids, marked), 2.0)
    for schedule in tools.SCHEDULES[:2]:
        with tools.emulated(schedule):
            found, wanted = (
                _everything((z, y, ids, marked), norms, c) for y, c in ((t, ceiling), (cut, None))
            )
        for a, c in zip(found, wanted, strict=True):
            # Sums are shifted by another number; rows of 16 bits may round to the neighbour.
            bound = 1e-5 if a.dtype == mx.float32 else 2**-7
            np.testing.assert_allclose(tools.float64(a), tools.float64(c), rtol=bound, atol=1e-5)


def _everything(
    inputs: tuple[mx.array, ...], norms: pair.PairNorms, ceiling: mx.array | None
) -> list[mx.array]:
    z, t, ids, marked = inputs
    n, b = len(z), mx.array(0.5)
    one, head = mx.ones((n,)), tools.vector(n, 1, ids.shape[-1])
    sums, other = pair.pair_sums(z, t, ids, marked, b, reverse=True, ceiling=ceiling)
    found = [*sums, *other]
    for weights in MIXTURES:
        found += pair.pair_divergence(z, t, ids, b, norms, weights=weights, ceiling=ceiling)
    by_gap, by_term = pair.PairWeights(one, one, gap=one, teacher=one), pair.PairWeights(one, one, term=one)
    for factors, weights in ((by_gap, None), (by_term, MIXTURES[0]), (by_term, None)):
        found.append(
            pair.pair_slope(
                z,
                t,
                ids,
                marked,
                b,
                norms,
                factors,
                divergence=weights,
                head=head,
                label=one,
                ceiling=ceiling,
            )
        )
    return found
