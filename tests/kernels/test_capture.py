"""Capture under the emulation: exact heads, in order, and sums against float64."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.kernels import capture, engaged, tuning
from pmetal_distill.kernels import capture as public_capture
from pmetal_distill.kernels.capture import grid_of, rank_of
from schemas.spec import DEFAULT_NODES
from tests.kernels import tools
from tests.kernels.host.builder import Schedule

OFF_GRID = (0.13, 0.51, 1.0)


def _reference(z: mx.array, k: int, nodes: Sequence[float]) -> tuple[Any, Any, Any]:
    x = tools.float64(z)
    order = np.argsort(-x, axis=-1, kind="stable")
    tail = np.take_along_axis(x, order[:, k:], -1) - np.take_along_axis(x, order[:, k - 1 : k], -1)
    curve = np.stack([tools.logsumexp(b * tail) for b in nodes], -1) if k < x.shape[-1] and nodes else None
    return order[:, :k], tools.logsumexp(x), curve


def _check(
    z: mx.array,
    k: int,
    nodes: Sequence[float] = DEFAULT_NODES,
    schedule: Schedule = tools.SCHEDULES[0],
    shape: tuning.Shape | None = None,
) -> None:
    with tools.emulated(schedule, shape):
        found = capture(z, k=k, nodes=nodes)
    ids, lse, curve = _reference(z, k, nodes)
    where = f"V={z.shape[-1]} {z.dtype} k={k} {schedule} {shape}"
    np.testing.assert_array_equal(np.array(found.ids), ids, where)
    tools.assert_close(found.scores, np.take_along_axis(tools.float64(z), ids, -1), 0.0, where)
    tools.assert_close(found.lse, lse, 3e-6, where)
    tools.assert_close(found.lowest, tools.float64(z).min(-1), 0.0, where)
    if curve is not None:
        tools.assert_close(found.curve, curve, 5e-6, where)
    assert engaged()["capture"]


@pytest.mark.parametrize("dtype", tools.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", tools.VOCABULARIES)
def test_equals_a_sort(vocab: int, dtype: mx.Dtype) -> None:
    z = tools.logits(tools.rows_for(vocab) + 1, vocab, dtype)
    sizes = (min(5, vocab - 1), min(16, vocab - 1), min(64, vocab - 1), min(256, vocab - 1))
    shapes = (tuning.Shape(512, 1), tuning.Shape(96, 2), tuning.Shape(192, 1), tuning.Shape(1024, 2))
    for schedule, shape, k in zip(tools.SCHEDULES, shapes, sizes, strict=True):
        _check(z, k, schedule=schedule, shape=shape)


@pytest.mark.parametrize("nodes", [(), (0.5,), (1.0,), OFF_GRID, (0.125, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)])
def test_any_nodes(nodes: tuple[float, ...]) -> None:
    _check(tools.logits(3, 5000, mx.float32), 16, nodes)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["constant", "ascending", "descending", "two values", "late", "signs", "sampled"]
)
def test_rows_that_overflow_the_list_or_leave_it_short_or_tie(name: str, dtype: mx.Dtype) -> None:
    vocab, width = 9000, tuning.vector_width(dtype)
    rng = np.random.default_rng(4)
    rows = {
        "constant": np.full(vocab, -1.5),
        "ascending": np.arange(vocab) / 500.0,
        "descending": -np.arange(vocab) / 500.0 - 1.0,
        "two values": np.where(rng.random(vocab) < 0.6, 2.0, -3.0),
        "late": np.where(np.arange(vocab) // 256 % 2 == 1, 5.0, 0.0) + rng.random(vocab),
        "signs": np.where(rng.random(vocab) < 0.5, 0.0, -0.0),
        # All that is large lies where the first pass looks: fewer than k scores reach its floor.
        "sampled": np.where(np.arange(vocab) // width % 128 < 32, 5.0, 0.0) + rng.random(vocab),
    }
    z = mx.array(np.stack([rows[name], np.roll(rows[name], 777)]).astype(np.float32)).astype(dtype)
    for schedule in tools.SCHEDULES:
        _check(z, 64, schedule=schedule, shape=tuning.Shape(128, 1))


def test_masked_columns() -> None:
    z = np.array(tools.logits(3, 9000, mx.float32))
    z[0, 10:] = -1e30
    z[1, 10:] = -np.inf
    z[2, 100:] = np.finfo(np.float32).min
    with tools.emulated(Schedule(2, 1)):
        found = capture(mx.array(z), k=16, nodes=DEFAULT_NODES)
    order = np.argsort(-z, axis=-1, kind="stable")[:, :16]
    np.testing.assert_array_equal(np.array(found.ids), order)
    wanted = [np.log(np.exp(row[row > -1e29].astype(np.float64)).sum()) for row in z]
    np.testing.assert_allclose(np.array(found.lse), wanted, rtol=3e-6)
    np.testing.assert_array_equal(np.array(found.lowest), z.min(-1))


@pytest.mark.parametrize("offset", [-3e4, 1e6, 3e9, -1e30])
def test_a_common_offset_costs_no_digits(offset: float) -> None:
    z = np.array(tools.logits(2, 9000, mx.float32))
    z = z.round(1 if abs(offset) < 1e5 else 0).astype(np.float64) * max(1.0, abs(offset) / 1e6) + offset
    z = z.astype(np.float32)
    with tools.emulated():
        found = capture(mx.array(z), k=16, nodes=DEFAULT_NODES)
    ids, lse, curve = _reference(mx.array(z), 16, DEFAULT_NODES)
    np.testing.assert_array_equal(np.array(found.ids), ids)
    np.testing.assert_allclose(np.array(found.lse), lse, rtol=1e-7)
    np.testing.assert_allclose(np.array(found.curve), curve, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(("k", "sample"), [(16, 8), (64, 8), (256, 8), (64, 3), (1, 8), (64, 1)])
def test_the_floor_is_seldom_too_high(k: int, sample: int) -> None:
    rank = rank_of(k, sample)
    rng = np.random.default_rng(0)
    # The list is short when `rank` of the k - 1 largest scores are among the sampled ones.
    assert (rng.binomial(k - 1, 1 / sample, 200_000) >= rank).mean() < 1e-3
    assert rank <= k


def test_a_tail_far_below_the_head_gives_its_largest_term() -> None:
    z = np.full((2, 9000), -2000.0, np.float32)
    z[:, :20] = np.arange(20)
    z[:, 4000] = -1500.0
    with tools.emulated():
        found = capture(mx.array(z), k=20, nodes=DEFAULT_NODES)
    _, _, curve = _reference(mx.array(z), 20, DEFAULT_NODES)
    np.testing.assert_allclose(np.array(found.curve), curve, rtol=1e-5)


def test_nan_is_seen_and_harms_nothing_else() -> None:
    z = np.array(tools.logits(2, 9000, mx.float32))
    z[0, 8000] = np.nan
    with tools.emulated():
        found = capture(mx.array(z), k=16, nodes=DEFAULT_NODES)
    lse = np.array(found.lse)
    assert np.isnan(lse[0])
    assert np.isfinite(lse[1])
    assert (np.array(found.ids) < 9000).all()


def test_the_whole_row_is_the_head() -> None:
    _check(tools.logits(3, 200, mx.float32), 200)


def test_plain_operations_give_the_same_also_with_ties() -> None:
    z = (tools.logits(4, 700, mx.float32) * 4).astype(mx.int32).astype(mx.float32)
    plain = capture(z, k=40, nodes=DEFAULT_NODES)
    assert "capture" not in engaged()
    ids, lse, curve = _reference(z, 40, DEFAULT_NODES)
    np.testing.assert_array_equal(np.array(plain.ids), ids)
    tools.assert_close(plain.lse, lse, 3e-6)
    tools.assert_close(plain.lowest, tools.float64(z).min(-1), 0.0)
    tools.assert_close(plain.curve, curve, 5e-6)
    with tools.emulated():
        assert np.array_equal(np.array(public_capture(z, k=40).ids), ids)


def test_too_large_a_head_is_left_to_plain_operations() -> None:
    z = tools.logits(2, 700, mx.float32)
    with tools.emulated():
        found = capture(z, k=300)
    assert "capture" not in engaged()
    np.testing.assert_array_equal(np.array(found.ids), _reference(z, 300, ())[0])


def test_grids() -> None:
    assert grid_of(DEFAULT_NODES) == (16, (1, 3, 6, 8, 12, 14, 16))
    assert grid_of((1.0,)) == (1, (1,))
    assert grid_of(OFF_GRID) == (0, ())
    assert grid_of((0.5, 2.0)) == (0, ())
