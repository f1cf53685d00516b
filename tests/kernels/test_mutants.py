"""Every barrier of every body is needed: without it, the emulation must notice in at least one schedule."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.kernels import capture, pair, row, sources, tuning
from schemas.spec import DEFAULT_NODES
from tests.kernels import tools
from tests.kernels.host.builder import EmulationError, count_barriers, host_kernel, without_barrier

SHAPE = tuning.Shape(128, 1)


def _row() -> list[mx.array]:
    z, ids = tools.logits(3, 3000, mx.float32), tools.head_ids(3, 3000, 64)
    marked, b, one = mx.zeros((3,), mx.int32), mx.array(0.5), mx.ones((3,))
    sums = row.tail_sums(z, ids, marked, b)
    head = tools.vector(3, 1, 64)
    weights = (one, one, mx.full((3,), 12.0))
    return [*sums, row.tail_slope(z, ids, marked, b, weights=weights, head=head, label=one)]


def _pair() -> list[mx.array]:
    z, t = tools.logits(3, 3000, mx.float32), tools.logits(3, 3000, mx.float32, seed=2)
    ids, marked, b, one = tools.head_ids(3, 3000, 64), mx.zeros((3,), mx.int32), mx.array(0.5), mx.ones((3,))
    sums, other = pair.pair_sums(z, t, ids, marked, b, reverse=True)
    norms = pair.PairNorms(one * 12.0, one, one * 12.0, one)
    terms = pair.pair_divergence(z, t, ids, b, norms, weights=(0.5, 0.5, 0.5))
    weights = pair.PairWeights(one, one, teacher=one)
    slope = pair.pair_slope(
        z, t, ids, marked, b, norms, weights, divergence=None, head=tools.vector(3, 1, 64), label=one
    )
    return [*sums, *other, *terms, slope]


def _capture() -> list[mx.array]:
    z = np.array(tools.logits(4, 5000, mx.float32))
    z[1] = np.arange(5000) / 100.0
    z[2] = 1.0
    z[3, np.arange(5000) // 4 % 128 < 32] += 30.0
    return list(capture(mx.array(z), k=32, nodes=DEFAULT_NODES))


RUNS: dict[str, Callable[[], list[mx.array]]] = {
    "tail_sums": _row,
    "tail_sums_grad": _row,
    "pair_sums": _pair,
    "pair_divergence": _pair,
    "pair_grad": _pair,
    "capture": _capture,
}
MUTANTS = [(name, i) for name in RUNS for i in range(count_barriers(sources.text(f"{name}.metal")))]


def _maker(mutant: str, index: int, schedule: Any) -> Any:
    def make(*, name: str, source: str, **rest: Any) -> Any:
        if name.startswith(f"pmetal_{mutant}_") and sources.text(f"{mutant}.metal") == source:
            source = without_barrier(source, index)
        return host_kernel(name=name, source=source, schedule=lambda: schedule, **rest)

    return make


def _same(a: list[mx.array], b: list[mx.array]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(np.allclose(np.array(x), np.array(y), rtol=1e-4, atol=1e-5) for x, y in pairs)


@pytest.mark.parametrize("name", RUNS)
def test_bodies_without_a_mutation_are_the_same_in_all_schedules(name: str) -> None:
    found = []
    for schedule in tools.SCHEDULES:
        with tools.emulated(schedule, SHAPE):
            found.append(RUNS[name]())
    assert all(_same(found[0], other) for other in found[1:])


@pytest.mark.parametrize(("name", "index"), MUTANTS)
def test_a_missing_barrier_is_noticed(name: str, index: int) -> None:
    with tools.emulated(tools.SCHEDULES[0], SHAPE):
        right = RUNS[name]()
    noticed = []
    for schedule in tools.SCHEDULES:
        with tools.emulated(schedule, SHAPE, make=_maker(name, index, schedule)):
            try:
                noticed.append(not _same(RUNS[name](), right))
            except EmulationError:
                noticed.append(True)
    assert any(noticed)


def test_the_list_of_mutants_is_complete() -> None:
    bodies = {"tail_sums": 3, "tail_sums_grad": 1, "pair_sums": 3, "pair_divergence": 3, "pair_grad": 1}
    assert {n: sum(m == n for m, _ in MUTANTS) for n in RUNS} == {**bodies, "capture": 11}
