"""Predictions taken off on the device against those of the codec."""

import dataclasses
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.offline.capture import CoordinateMap, PendingCapture
from pmetal_distill.offline.device_predictor import DevicePredictor
from pmetal_distill.offline.shard import ShardDraft
from pmetal_distill.offline.writer import CapturedSequence
from schemas.arrays import TargetArrays, TokenRows
from schemas.basis import SketchBasis, plan_groups
from schemas.codec import Codec, decode, encode
from schemas.errors import IncompatibleError
from schemas.predictor import SketchPredictor
from schemas.spec import TargetSpec

V, R, K, N = 300, 12, 8, 700


@pytest.fixture(scope="module")
def basis() -> SketchBasis:
    rng = np.random.default_rng(0)
    components = rng.normal(size=(V, R)).astype(np.float32)
    # Some sums leave the range of 16 bits, as the format allows.
    weights = [(scale * rng.normal(size=(R, R))).astype(np.float32) for scale in (60.0, 30.0)]
    predictor = SketchPredictor(*weights, np.ones(R, np.float32))
    groups = plan_groups(np.full(R, 40.0), 0.5)
    return SketchBasis(np.zeros(V, np.float32), components, 0.5, groups).with_predictor(predictor)


def captured(basis: SketchBasis) -> tuple[TargetArrays, TokenRows]:
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((N, V)), axis=1)[:, :K].astype(np.int32)
    tokens = rng.integers(0, V, N, dtype=np.int32)
    logprobs = -np.sort(rng.exponential(2, (N, K)), axis=1).astype(np.float32) - 1
    spec = TargetSpec(V, K, "sketch")
    coordinates = basis.predict(tokens, ids) + rng.normal(0, 20, (N, R)).astype(np.float32)
    curve = np.ones((N, spec.num_nodes), np.float32)
    rows = TokenRows(tokens, np.zeros(N, np.int32), np.zeros(N, np.int32), np.ones(N, np.bool_))
    return TargetArrays(ids, logprobs, curve, coordinates), rows


def test_what_is_stored_is_what_the_codec_would_predict_itself(basis: SketchBasis) -> None:
    targets, rows = captured(basis)
    codec = Codec(TargetSpec(V, K, "sketch"), basis)
    left = DevicePredictor(basis).residual(
        rows.token_ids, mx.array(targets.coordinates), mx.array(targets.head_ids)
    )
    given = dataclasses.replace(targets, coordinates=np.array(left))
    one = decode(encode(targets, rows, codec)[0], codec)[1].coordinates
    two = decode(encode(given, rows, codec, predicted=True)[0], codec)[1].coordinates
    apart = np.abs(one - two)
    assert apart.max() <= basis.step * 1.001
    assert (apart > basis.step / 2).mean() < 1e-3  # float32 rounds the other way at a half
    assert np.abs(two - targets.coordinates).max() < basis.step
    wrong = decode(encode(given, rows, codec)[0], codec)[1].coordinates
    assert np.abs(wrong - targets.coordinates).max() > 10 * basis.step


@pytest.mark.parametrize("gpu", [False, True])
def test_a_pending_capture_says_whether_predictions_are_taken_off(
    basis: SketchBasis, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pmetal_distill.offline.capture.on_gpu", lambda: gpu)
    rng = np.random.default_rng(2)
    weight, hidden = (mx.array(rng.normal(size=(n, 16)).astype(np.float32)) for n in (V, 9))
    sketch = CoordinateMap("hidden", rng.normal(size=(R, 16)).astype(np.float32), np.ones(R, np.float32))
    tokens = np.arange(9, dtype=np.int32)
    spec = TargetSpec(V, K, "sketch")

    def pending(**more: object) -> PendingCapture:
        return PendingCapture(hidden, lambda h: h @ weight.T, spec, sketch=sketch, chunk=4, **more)  # type: ignore[arg-type]

    plain, found = pending(), pending(predict=partial(DevicePredictor(basis).residual, tokens))
    assert (plain.predicted, found.predicted) == (False, gpu)
    exact, got = plain.result(), found.result()
    expected = exact.coordinates - (basis.predict(tokens, exact.head_ids) if gpu else 0)
    np.testing.assert_allclose(got.coordinates, expected, rtol=1e-4, atol=1e-2)


def test_a_row_group_is_predicted_as_a_whole(basis: SketchBasis) -> None:
    targets, rows = captured(basis)
    parts = [
        CapturedSequence(rows.token_ids[s], rows.documents[s], rows.loss_mask[s], targets[s], {}, flag)
        for s, flag in ((slice(0, 5), False), (slice(5, 9), True))
    ]
    draft = ShardDraft.__new__(ShardDraft)
    with pytest.raises(IncompatibleError, match="all sequences of a row group"):
        draft.encode(list(enumerate(parts)))
