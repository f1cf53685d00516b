import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.curve import TailCurve
from schemas.errors import CorruptionError, IncompatibleError
from schemas.spec import TargetSpec


def test_curve_reproduces_its_nodes_and_zero():
    curve = TailCurve((0.125, 0.5, 1.0), vocab_size=100, k=4)
    values = np.array([[4.0, 3.0, 2.0]])
    assert curve.evaluate(values, 0.5) == pytest.approx(3.0)
    assert curve.evaluate(values, 0.0) == pytest.approx(math.log(96))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.floats(0, 1), st.integers(0, 10**6))
def test_curve_is_exact_for_polynomials_of_its_degree(num_nodes, b, seed):
    rng = np.random.default_rng(seed)
    nodes = tuple(np.sort(rng.choice(np.arange(1, 33) / 32, num_nodes, replace=False)))
    curve = TailCurve(nodes, vocab_size=1000, k=8)
    b *= nodes[-1]
    coefficients = np.append(rng.normal(size=num_nodes), curve.at_zero)
    stored = np.polyval(coefficients, np.array(nodes))
    assert curve.evaluate(stored, b) == pytest.approx(np.polyval(coefficients, b), abs=1e-6)
    assert curve.weights(b).sum() == pytest.approx(1.0)


def test_curve_interpolates_a_real_tail_within_a_hundredth():
    logits = np.sort(np.random.default_rng(0).normal(0, 3, 5000))[::-1]
    tail = logits[16:] - logits[15]
    spec = TargetSpec(vocab_size=5000)
    stored = np.array([np.log(np.exp(b * tail).sum()) for b in spec.curve_nodes])
    for temperature in (1, 1.3, 2, 3, 4, 6, 8):
        b = 1 / temperature
        assert spec.curve.evaluate(stored, b) == pytest.approx(np.log(np.exp(b * tail).sum()), abs=0.01)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_slope_at_zero_is_exact_for_polynomials_of_its_degree(num_nodes, seed):
    rng = np.random.default_rng(seed)
    nodes = tuple(np.sort(rng.choice(np.arange(1, 33) / 32, num_nodes, replace=False)))
    curve = TailCurve(nodes, vocab_size=1000, k=8)
    coefficients = np.append(rng.normal(size=num_nodes), curve.at_zero)
    stored = np.polyval(coefficients, np.array(nodes))
    tolerance = 1e-9 * np.abs(curve.slope_weights()).sum()
    assert curve.slope(stored) == pytest.approx(coefficients[-2], abs=tolerance)
    weights = curve.slope_weights()
    assert weights[0] * curve.at_zero + stored @ weights[1:] == pytest.approx(coefficients[-2], abs=tolerance)


def test_slope_at_zero_of_a_real_tail_is_its_mean():
    logits = np.sort(np.random.default_rng(0).normal(0, 3, 5000))[::-1]
    tail = logits[16:] - logits[15]
    spec = TargetSpec(vocab_size=5000)
    stored = np.array([np.log(np.exp(b * tail).sum()) for b in spec.curve_nodes])
    assert spec.curve.slope(stored) == pytest.approx(tail.mean(), abs=0.01)


@pytest.mark.parametrize("b", [-0.1, 1.01, float("nan")])
def test_curve_refuses_to_extrapolate(b):
    with pytest.raises(ValueError, match="1/T must be from 0 to 1"):
        TailCurve((0.5, 1.0), vocab_size=10, k=2).weights(b)


def test_spec_survives_json():
    spec = TargetSpec(vocab_size=49152, k=32, tail="bucket", curve_nodes=(0.1, 1 / 3, 1.0))
    assert TargetSpec.from_json(json.loads(json.dumps(spec.to_json())), where="x") == spec


def test_spec_without_tail_has_no_curve():
    assert TargetSpec(vocab_size=10, k=10, tail="none").num_nodes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "x: 'k': must be an integer from 1 to 4096, found 0"),
        ({"k": True}, "'k': must be an integer"),
        ({"k": 100}, "k <= 99 with a vocabulary of 100"),
        ({"vocab_size": 1 << 25}, "'vocab_size': must be an integer"),
        ({"tail": "all"}, "'tail': must be one of none, bucket, sketch, found 'all'"),
        ({"curve_nodes": [0.5, 0.25, 1.0]}, "ascending curve_nodes"),
        ({"curve_nodes": [0.5]}, "with 1.0 among them"),
        ({"curve_nodes": [0.5, "1"]}, "'curve_nodes': must be a number"),
        ({"logprob_step": float("nan")}, "'logprob_step': must be a number"),
        ({"extra": 1}, "found unknown \\['extra'\\]"),
        ({"k": ...}, "key 'k' must be present"),
    ],
)
def test_spec_refuses(change, message):
    raw = TargetSpec(vocab_size=100).to_json() | change
    with pytest.raises(CorruptionError, match=message):
        TargetSpec.from_json({k: v for k, v in raw.items() if v is not ...}, where="x")


def test_spec_constructor_names_itself():
    with pytest.raises(IncompatibleError, match="TargetSpec: 'k': must be an integer"):
        TargetSpec(vocab_size=100, k=0)
    with pytest.raises(IncompatibleError, match="k must be from 1 to the stored 16, found 17"):
        TargetSpec(vocab_size=100).with_k(17)
