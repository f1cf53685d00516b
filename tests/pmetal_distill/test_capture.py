"""Capture against dense float64 NumPy: ties, extremes, every k, half precision, bad rows."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmetal_distill.offline.capture import (
    CoordinateMap,
    PendingCapture,
    _queued,
    _received,
    capture,
    capture_hidden,
)
from pmetal_distill.offline.row_capture import top_ids
from schemas.errors import IncompatibleError, NonFiniteError
from schemas.spec import TargetSpec

NODES = tuple(b / 16 for b in (1, 3, 6, 8, 12, 14, 16))


def reference(logits, spec):
    """Head and curve, the obvious way."""
    z = np.asarray(logits, np.float64)
    order = np.lexsort((np.broadcast_to(np.arange(z.shape[1]), z.shape), -z), axis=1)
    ids, ranked = order[:, : spec.k], np.take_along_axis(z, order, axis=1)
    logprobs = ranked - np.logaddexp.reduce(ranked, axis=1, keepdims=True)
    tail = ranked[:, spec.k :] - ranked[:, spec.k - 1 : spec.k]
    curve = [np.logaddexp.reduce(b * tail, axis=1) for b in spec.curve_nodes]
    return ids, logprobs[:, : spec.k], np.stack(curve, axis=1) if curve else np.zeros((len(z), 0))


def check(logits, spec, *, given=None, tolerance=2e-5):
    found = capture(logits if given is None else given, spec)
    ids, logprobs, curve = reference(logits, spec)
    np.testing.assert_array_equal(found.head_ids, ids)
    np.testing.assert_allclose(found.head_logprobs, logprobs, rtol=3e-7, atol=tolerance)
    np.testing.assert_allclose(found.tail_curve, curve, rtol=3e-7, atol=tolerance)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    vocab_size=st.integers(2, 700),
    k=st.integers(1, 40),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 0.1, 3.0, 40.0]),
    ties=st.booleans(),
    nodes=st.sampled_from([NODES, (1.0,), (0.3, 1.0), (1 / 64, 0.5, 1.0), (0.25, 1.0, 2.0)]),
)
def test_agrees_with_dense(vocab_size, k, seed, scale, ties, nodes):
    logits = np.random.default_rng(seed).normal(size=(3, vocab_size)).astype(np.float32) * scale
    if ties:
        logits = np.round(logits)
    k = min(k, vocab_size - 1)
    check(logits, TargetSpec(vocab_size, k, "bucket", nodes), tolerance=1e-4)
    check(logits, TargetSpec(vocab_size, k, "none"))


@pytest.mark.parametrize("k", [1, 2, 320])
def test_whole_vocabulary_in_the_head(k):
    logits = np.random.default_rng(k).normal(size=(4, 320)).astype(np.float32)
    check(logits, TargetSpec(320, k, "none"))


@pytest.mark.parametrize("low", [-1e4, 1e4])
def test_extreme_logits(low):
    logits = np.random.default_rng(0).normal(size=(6, 3000)).astype(np.float32)
    logits[:, 5] = low
    logits[1, 7] = 1e4
    logits[2, :] -= 1e4
    logits[3, :40] += 1e4
    logits[4, 1:] -= 2e4
    check(logits, TargetSpec(3000, 16, "bucket", NODES), tolerance=2e-3)


def test_large_vocabulary():
    logits = np.random.default_rng(1).normal(size=(3, 151_936)).astype(np.float32) * 3
    check(logits, TargetSpec(151_936, 16, "bucket", NODES))


def test_equal_logits_go_by_id():
    logits = np.zeros((2, 5000), np.float32)
    logits[1, 4000:] = 1
    ids = capture(logits, TargetSpec(5000, 64, "bucket", NODES)).head_ids
    np.testing.assert_array_equal(ids, [np.arange(64), np.arange(4000, 4064)])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_every_type_of_mlx(dtype):
    logits = (mx.random.normal((5, 2000), key=mx.random.key(0)) * 4).astype(dtype)
    exact = np.array(logits.astype(mx.float32))
    check(exact, TargetSpec(2000, 16, "bucket", NODES), given=logits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tail", ["none", "bucket"])
def test_names_the_row_that_is_not_finite(bad, tail):
    logits = np.zeros((4, 1000), np.float32)
    logits[2, 417] = bad
    with pytest.raises(NonFiniteError, match="row 12: logits must be finite"):
        capture(logits, TargetSpec(1000, 8, tail), first_row=10)


def test_large_but_finite_logits_pass():
    logits = np.full((1, 1000), -2e19, np.float32)
    logits[0, 3] = 0
    assert capture(logits, TargetSpec(1000, 1, "none")).head_ids[0, 0] == 3


def test_coordinates_are_the_linear_map():
    rng = np.random.default_rng(3)
    hidden, weight = (
        rng.normal(size=(7, 12)).astype(np.float32),
        rng.normal(size=(300, 12)).astype(np.float32),
    )
    sketch = CoordinateMap("hidden", rng.normal(size=(5, 12)).astype(np.float32), np.ones(5, np.float32))
    spec = TargetSpec(300, 8, "sketch", NODES)
    found = capture_hidden(hidden, lambda h: h @ mx.array(weight).T, spec, sketch=sketch, chunk=3)
    np.testing.assert_allclose(found.coordinates, hidden @ sketch.projection.T + 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.head_ids, capture(hidden @ weight.T, spec).head_ids)
    of_logits = CoordinateMap("logits", np.eye(4, 300, dtype=np.float32), np.zeros(4, np.float32))
    found = capture(hidden @ weight.T, spec, sketch=of_logits)
    np.testing.assert_allclose(found.coordinates, (hidden @ weight.T)[:, :4], rtol=1e-6)


def test_no_rows():
    spec = TargetSpec(300, 8, "bucket", NODES)
    assert capture_hidden(np.zeros((0, 12), np.float32), lambda h: h, spec).shapes() == (
        (0, 8),
        (0, 8),
        (0, 7),
        (0, 0),
    )
    assert capture(np.zeros((0, 300), np.float32), spec).leading == (0,)


def test_refuses_what_does_not_fit():
    spec = TargetSpec(300, 8, "bucket", NODES)
    with pytest.raises(IncompatibleError, match=r"logits must be \[n, 300\]"):
        capture(np.zeros((2, 301), np.float32), spec)
    sketch = CoordinateMap("hidden", np.zeros((5, 12), np.float32), np.zeros(5, np.float32))
    with pytest.raises(IncompatibleError, match=r"needs hidden \[n, 12\], found none"):
        capture(np.zeros((2, 300), np.float32), spec, sketch=sketch)
    nan = np.full((2, 12), np.nan, np.float32)
    with pytest.raises(NonFiniteError, match="row 0: hidden states"):
        capture(np.zeros((2, 300), np.float32), spec, hidden=nan, sketch=sketch)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.integers(1, 900), st.integers(1, 60), st.integers(0, 999), st.integers(1, 30))
def test_top_ids_with_ties(length, count, seed, distinct):
    row = np.random.default_rng(seed).integers(0, distinct, length).astype(np.float32)
    count = min(count, length)
    np.testing.assert_array_equal(top_ids(row, count), np.lexsort((np.arange(length), -row))[:count])


def on_device(logits, spec, *, hidden=None, sketch=None):
    """The path that GPUs take, here through plain operations on the CPU."""
    states = None if hidden is None else mx.array(hidden)
    found = np.array(_queued(mx.array(logits), states, spec, sketch))
    return _received(found, spec, "row {}".format)


@pytest.mark.parametrize("tail", ["none", "bucket"])
def test_the_device_path_gives_the_same(tail):
    logits = np.array(mx.random.normal((6, 3000), key=mx.random.key(1)) * 4)
    spec = TargetSpec(3000, 16, tail, NODES)
    found = on_device(logits, spec)
    wanted = reference(logits, spec)
    np.testing.assert_array_equal(found.head_ids, wanted[0])
    np.testing.assert_allclose(found.head_logprobs, wanted[1], rtol=1e-6, atol=2e-5)
    np.testing.assert_allclose(found.tail_curve, wanted[2], rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_coordinates_on_the_device_are_the_same(source):
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(7, 12)).astype(np.float32)
    logits = rng.normal(size=(7, 300)).astype(np.float32)
    width = 12 if source == "hidden" else 300
    sketch = CoordinateMap(
        source, rng.normal(size=(5, width)).astype(np.float32), np.arange(5, dtype=np.float32)
    )
    spec = TargetSpec(300, 8, "sketch", NODES)
    found = on_device(logits, spec, hidden=hidden, sketch=sketch)
    rows = hidden if source == "hidden" else logits
    exact = rows.astype(np.float64) @ sketch.projection.T.astype(np.float64) + np.arange(5)
    np.testing.assert_allclose(found.coordinates, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.head_ids, capture(logits, spec).head_ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_device_path_names_bad_rows(bad):
    logits = np.zeros((4, 1000), np.float32)
    logits[3, 17] = bad
    with pytest.raises(NonFiniteError, match="row 3: logits must be finite"):
        on_device(logits, TargetSpec(1000, 8, "bucket", NODES))
    sketch = CoordinateMap("hidden", np.ones((2, 5), np.float32), np.zeros(2, np.float32))
    hidden = np.zeros((4, 5), np.float32)
    hidden[2, 1] = bad
    with pytest.raises(NonFiniteError, match="row 2: hidden states must be finite"):
        on_device(np.zeros((4, 1000)), TargetSpec(1000, 8, "sketch", NODES), hidden=hidden, sketch=sketch)


@pytest.mark.parametrize("gpu", [False, True])
def test_pending_captures_are_those_of_all_rows_at_once(gpu, monkeypatch):
    monkeypatch.setattr("pmetal_distill.offline.capture.on_gpu", lambda: gpu)
    rng = np.random.default_rng(6)
    weight = mx.array(rng.normal(size=(300, 12)).astype(np.float32))
    hidden = rng.normal(size=(11, 12)).astype(np.float32)
    spec = TargetSpec(300, 8, "bucket", NODES)

    def pending(states):
        return PendingCapture(
            mx.array(states), lambda h: h @ weight.T, spec, chunk=4, place="token {}".format
        )

    found = [pending(hidden), pending(hidden[:2])]
    whole = capture(hidden @ np.array(weight).T, spec)
    for one, wanted in zip(found, (whole, whole[:2]), strict=True):
        got = one.result()
        np.testing.assert_array_equal(got.head_ids, wanted.head_ids)
        np.testing.assert_allclose(got.head_logprobs, wanted.head_logprobs, atol=2e-5)
        np.testing.assert_allclose(got.tail_curve, wanted.tail_curve, atol=2e-5)
    hidden[9] = np.nan
    with pytest.raises(NonFiniteError, match="token 9: logits must be finite"):
        pending(hidden).result()


def test_taking_a_result_from_a_gpu_queues_nothing(monkeypatch):
    """Work queued then would wait behind the next batches, and the device would run dry each time."""
    monkeypatch.setattr("pmetal_distill.offline.capture.on_gpu", lambda: True)
    rng = np.random.default_rng(7)
    weight, hidden = (mx.array(rng.normal(size=(n, 12)).astype(np.float32)) for n in (300, 9))
    sketch = CoordinateMap("hidden", rng.normal(size=(5, 12)).astype(np.float32), np.ones(5, np.float32))
    spec = TargetSpec(300, 8, "sketch", NODES)
    pending = PendingCapture(hidden, lambda h: h @ weight.T, spec, sketch=sketch, chunk=4)

    class Forbidden:
        def __getattr__(self, name):
            pytest.fail(f"mx.{name} was called")

    monkeypatch.setattr("pmetal_distill.offline.capture.mx", Forbidden())
    found = pending.result()
    np.testing.assert_allclose(
        found.coordinates, np.array(hidden) @ sketch.projection.T + 1, rtol=1e-5, atol=1e-5
    )
