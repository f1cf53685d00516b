"""Entropy and tail mass against the dense distribution in float64."""

import numpy as np
import pytest

from pipeline.reporting.entropy import curve_slope, entropy
from schemas.arrays import TargetArrays
from schemas.spec import TargetSpec
from tests import reference

V, K, N = 500, 8, 40


def teacher(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, V)) * rng.uniform(0.5, 3.0, size=(N, 1))


def cached(logits: np.ndarray, spec: TargetSpec) -> TargetArrays:
    """The target of dense logits, not rounded to any grid."""
    ids = reference.top_k(logits, spec.k)
    head = np.take_along_axis(reference.log_softmax(logits), ids, axis=1)
    curve = reference.tail_values(logits, ids, spec.curve_nodes)
    return TargetArrays(
        ids.astype(np.int32), head.astype(np.float32), curve.astype(np.float32), np.zeros((N, 0), np.float32)
    )


@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0, 4.0, 8.0, 40.0])
def test_the_curve_alone_gives_the_entropy_of_the_whole_distribution(temperature: float) -> None:
    logits, spec = teacher(), TargetSpec(V, k=K, tail="bucket")
    nats, tail = entropy(cached(logits, spec), spec, temperature=temperature)
    logp = reference.log_softmax(logits, temperature)
    exact = -(np.exp(logp) * logp).sum(axis=1)
    in_head = np.take_along_axis(np.exp(logp), reference.top_k(logits, K), axis=1).sum(axis=1)
    assert np.abs(nats - exact).max() < 0.02
    assert np.abs(tail - (1 - in_head)).max() < 2e-3


def test_without_a_tail_the_head_is_renormalised() -> None:
    logits, spec = teacher(1), TargetSpec(V, k=K, tail="none", curve_nodes=())
    full = cached(logits, TargetSpec(V, k=K, tail="bucket"))
    targets = TargetArrays(full.head_ids, full.head_logprobs, np.zeros((N, 0), np.float32), full.coordinates)
    nats, tail = entropy(targets, spec, temperature=2.0)
    p = np.exp(np.take_along_axis(reference.log_softmax(logits, 2.0), full.head_ids, axis=1))
    p /= p.sum(axis=1, keepdims=True)
    assert np.abs(nats + (p * np.log(p)).sum(axis=1)).max() < 1e-5
    assert not tail.any()


def test_the_slope_is_that_of_the_interpolation() -> None:
    spec = TargetSpec(V, k=K, tail="bucket")
    values = cached(teacher(2), spec).tail_curve.astype(np.float64)
    for b in (0.2, 0.5, 0.9):
        ahead, behind = (spec.curve.evaluate(values, b + h) for h in (1e-5, -1e-5))
        assert np.abs(curve_slope(spec.curve, values, b) - (ahead - behind) / 2e-5).max() < 1e-6
    at_zero = curve_slope(spec.curve, values, 0.0)
    assert np.abs(at_zero - spec.curve.slope(values)).max() < 1e-8
