"""The sketch: fits against dense weighted PCA, both fits against each other, rebuilding, errors, drift."""

import threading
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from pmetal_distill.modelling.heads import LinearHead
from pmetal_distill.offline import calibrate as calibrate_module
from pmetal_distill.offline.calibrate import MARGINS, DriftMonitor, calibrate, measure
from pmetal_distill.offline.capture import capture
from pmetal_distill.offline.fidelity import target_error
from pmetal_distill.offline.rebuild import reconstruct_logprobs
from pmetal_distill.offline.sample import Sample
from pmetal_distill.offline.sketch import Moments, fit_basis_linear, fit_basis_logits, meant_tokens, metric
from pmetal_distill.steps import Underway
from schemas.arrays import TargetArrays
from schemas.basis import NO_CEILING
from schemas.codec import Codec
from schemas.errors import IncompatibleError, NonFiniteError, UsageError
from schemas.spec import TargetSpec
from schemas.tail import tail_logits

V, D = 400, 24
NODES = tuple(b / 16 for b in (1, 3, 6, 8, 12, 14, 16))
SPEC = TargetSpec(V, 8, "sketch", NODES)


@dataclass(frozen=True)
class Head:
    weight: mx.array
    bias: mx.array | None = None
    scale: float | None = None
    softcap: float | None = None


def weights(seed=0):
    return np.random.default_rng(seed).normal(size=(V, D)).astype(np.float32) / 2


def states(n, *, seed=0, turn=0):
    """Hidden states of falling spread along axes that `turn` chooses."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(100 + turn).normal(size=(D, D)))[0]
    rows = rng.normal(size=(n, D)) * 4 * 0.75 ** np.arange(D) @ axes
    return (rows + axes[0]).astype(np.float32)


def moments(hidden, logits):
    return Moments.of(hidden, V).meaning(meant_tokens(logits))


def dense_pca(logits, rank):
    """Mean and best weighted rank-r approximation of the rows, up to a constant a row; all V at once."""
    z = logits.astype(np.float64)
    soft = [np.exp(z / t - np.logaddexp.reduce(z / t, axis=1, keepdims=True)) for t in (2, 4)]
    w = metric(sum(p.sum(axis=0) for p in soft))
    z = z - (z @ w / w.sum())[:, None]
    mean = z.mean(axis=0)
    left, values, right = np.linalg.svd((z - mean) * np.sqrt(w), full_matrices=False)
    return mean, (left[:, :rank] * values[:rank]) @ right[:rank] / np.sqrt(w), values / np.sqrt(len(z))


def rebuilt(fitted, hidden, logits):
    y = fitted.map.coordinates(hidden, logits)
    rows = fitted.mean + y @ fitted.components.T
    return rows - rows.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("rank", [1, 6, D])
def test_linear_fit_is_the_weighted_pca_of_the_logits(rank):
    hidden, w = states(300), weights()
    logits = hidden @ w.T
    mean, approximation, spread = dense_pca(logits, rank)
    fitted = fit_basis_linear(moments(hidden, logits), w, rank=rank, chunk=77)
    wanted = mean + approximation
    wanted -= wanted.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(rebuilt(fitted, hidden, logits), wanted, atol=2e-3)
    np.testing.assert_allclose(fitted.spread, spread[:rank], rtol=1e-3)
    coordinates = fitted.map.coordinates(hidden, logits)
    np.testing.assert_allclose(
        np.cov(coordinates.T, bias=True).diagonal() if rank > 1 else coordinates.var(),
        fitted.spread**2,
        rtol=1e-3,
    )


def test_both_fits_agree():
    hidden, w = states(500), weights()
    logits = hidden @ w.T
    linear = fit_basis_linear(moments(hidden, logits), w, rank=8)
    alone = fit_basis_logits(lambda: (logits[a : a + 60] for a in range(0, 500, 60)), rank=8)
    np.testing.assert_allclose(alone.spread, linear.spread, rtol=1e-2)
    other = states(50, seed=5)
    scale = np.abs(rebuilt(linear, other, other @ w.T)).mean()
    difference = rebuilt(linear, other, other @ w.T) - rebuilt(alone, other, other @ w.T)
    assert np.abs(difference).mean() < 0.02 * scale


def test_scale_bias_and_half_precision():
    hidden, w, bias = states(400), weights(), np.linspace(-1, 1, V, dtype=np.float32)
    layer = nn.Linear(D, V)
    layer.weight, layer.bias = mx.array(w).astype(mx.float16), 4 * mx.array(bias)
    head = LinearHead(layer, "lm_head", tied=False, scale=0.5)
    logits = np.array(head.logits(mx.array(hidden)))  # the one formula of a head
    fitted = fit_basis_linear(moments(hidden, logits), head.weight, rank=D, scale=head.scale, bias=head.bias)
    exact = logits - logits.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(rebuilt(fitted, hidden, logits), exact, atol=0.02)


def test_logits_of_a_soft_cap():
    hidden, w = states(400), weights()
    logits = 5 * np.tanh(hidden @ w.T / 5)
    fitted = fit_basis_logits(lambda: [logits], rank=60)
    exact = logits - logits.mean(axis=1, keepdims=True)
    assert np.abs(rebuilt(fitted, None, logits) - exact).mean() < 0.1 * np.abs(exact).mean()


def test_moments_add_up_and_scale():
    hidden, w = states(90), weights()
    logits = hidden @ w.T
    parts = [moments(hidden[a], logits[a]) for a in (slice(0, 31), slice(31, 90))]
    both, whole = parts[0] + parts[1], moments(hidden, logits)
    np.testing.assert_allclose(
        both.covariance, np.cov(hidden.T.astype(np.float64), bias=True), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(both.meant, whole.meant, rtol=1e-4)
    halved = whole.scaled(45)
    np.testing.assert_allclose(halved.mean, whole.mean)
    np.testing.assert_allclose(halved.covariance, whole.covariance, atol=1e-12)
    assert halved.tokens == 45


def test_needs_enough_tokens_and_dimensions():
    hidden, w = states(5), weights()
    few = moments(hidden, hidden @ w.T)
    with pytest.raises(UsageError, match="tokens must be at least the sketch rank 6, found 5"):
        fit_basis_linear(few, w, rank=6)
    with pytest.raises(UsageError, match="at most 24, the hidden size of this teacher, found 25"):
        fit_basis_linear(few, w, rank=25)
    with pytest.raises(UsageError, match="tokens must be at least the sketch rank 6, found 5"):
        fit_basis_logits(lambda: [hidden @ w.T], rank=6)
    with pytest.raises(UsageError, match="found none"):
        fit_basis_logits(list, rank=6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_names_rows_that_are_not_finite(bad):
    hidden = states(9)
    hidden[4, 2] = bad
    with pytest.raises(NonFiniteError, match="row 4 of its chunk: hidden states"):
        Moments.of(hidden, V)
    logits = np.zeros((9, V), np.float32)
    logits[4, 7] = bad
    with pytest.raises(NonFiniteError, match="row 4 of its chunk: logits"), np.errstate(invalid="ignore"):
        fit_basis_logits(lambda: [logits], rank=2)


def exact_sketch(hidden, w, *, rank=D, margin=NO_CEILING):
    logits = hidden @ w.T
    fitted = fit_basis_linear(moments(hidden, logits), w, rank=rank)
    basis = fitted.basis(step=1e-2, margin=margin)
    return logits, basis, capture(logits, SPEC, hidden=hidden, sketch=fitted.map)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 4.0, 50.0])
def test_a_full_sketch_gives_the_teacher_back(temperature):
    logits, basis, targets = exact_sketch(states(60), weights())
    z = logits.astype(np.float64) / temperature
    exact = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    found = reconstruct_logprobs(targets, SPEC, temperature=temperature, basis=basis)
    np.testing.assert_allclose(found, exact, atol=0.06)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(axis=1), 1, rtol=1e-5)


def test_bucket_is_even_and_none_is_renormalised():
    _, _, targets = exact_sketch(states(20), weights(), rank=4)
    targets = replace(targets, coordinates=np.zeros((20, 0), np.float32))
    bucket = reconstruct_logprobs(targets, replace(SPEC, tail="bucket"), temperature=2.0)
    np.testing.assert_allclose(np.exp(bucket.astype(np.float64)).sum(axis=1), 1, rtol=1e-5)
    assert (np.sort(bucket, axis=1)[:, : V - 8].std(axis=1) < 1e-5).all()
    none = TargetArrays(
        targets.head_ids, targets.head_logprobs, np.zeros((20, 0), np.float32), targets.coordinates
    )
    rows = reconstruct_logprobs(none, replace(SPEC, tail="none"), temperature=2.0)
    assert (np.isfinite(rows).sum(axis=1) == 8).all()
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, rtol=1e-5)


def test_no_tail_logit_passes_the_ceiling():
    logits, basis, targets = exact_sketch(states(200), weights(), rank=2, margin=0.5)
    rows = tail_logits(basis, SPEC.curve, targets)
    np.put_along_axis(rows, targets.head_ids, -np.inf, axis=1)
    tail = logits.copy()
    np.put_along_axis(tail, targets.head_ids, np.nan, axis=1)
    level = np.nanmean(tail, axis=1) - np.sort(logits, axis=1)[:, V - 8]
    free = tail_logits(replace(basis, margin=NO_CEILING), SPEC.curve, targets)
    highest = free.mean(axis=1) - level - 0.5
    assert (rows.max(axis=1) < highest + 0.3).all()
    assert (free.max(axis=1) > highest + 0.3).any()


def test_rebuilding_refuses_another_rank():
    _, basis, targets = exact_sketch(states(60), weights())
    with pytest.raises(IncompatibleError, match="rank"):
        reconstruct_logprobs(targets, SPEC, temperature=2.0, basis=basis.truncated(3))
    with pytest.raises(IncompatibleError, match="basis, found none"):
        reconstruct_logprobs(targets, SPEC, temperature=2.0)


def test_errors_against_dense_formulas():
    hidden = states(100)
    logits, basis, targets = exact_sketch(hidden, weights(), rank=4)
    found = target_error(logits, targets, SPEC, features=hidden, basis=basis, temperatures=(2.0,))[2.0]
    z = logits.astype(np.float64) / 2
    p = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
    q = reconstruct_logprobs(targets, SPEC, temperature=2.0, basis=basis).astype(np.float64)
    assert found.kl == pytest.approx((p * (np.log(p) - q)).sum(axis=1).mean(), rel=1e-3)
    assert found.total_variation == pytest.approx(np.abs(p - np.exp(q)).sum(axis=1).mean() / 2, rel=1e-3)
    wrong, right = hidden.T @ (np.exp(q) - p), hidden.T @ (p - p.mean(axis=0))
    exact = np.linalg.norm(wrong) / np.linalg.norm(right)
    assert found.gradient == pytest.approx(exact, rel=0.3)


def test_more_coordinates_and_a_head_mean_less_error():
    hidden = states(100)
    errors = []
    for rank in (2, 6, 12, D):
        logits, basis, targets = exact_sketch(hidden, weights(), rank=rank)
        errors.append(target_error(logits, targets, SPEC, features=hidden, basis=basis)[2.0].gradient)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


def sample(n, *, seed, turn=0, head):
    hidden = states(n, seed=seed, turn=turn)
    ids = np.random.default_rng(seed).integers(0, V, n).astype(np.int32)
    return Sample(hidden, lambda h: h @ head.weight.T, 64, ids)


def calibrated(**changes):
    head = Head(mx.array(weights()))
    options = {"rank": 12, "step": 2.0, "head": head} | changes
    return calibrate(sample(600, seed=1, head=head), sample(150, seed=2, head=head), SPEC, **options), head


def test_calibration_is_whole_and_the_same_every_time():
    first, _ = calibrated()
    again, _ = calibrated()
    assert first.basis.to_bytes() == again.basis.to_bytes()
    assert first.codebook.to_bytes() == again.codebook.to_bytes()
    assert first.error == again.error
    assert set(first.error) == {1.0, 2.0, 4.0}
    assert first.basis.margin in [np.float32(m) for m in MARGINS]
    assert first.basis.predictor is not None
    assert 0 < first.error[2.0].gradient < 0.5


def test_calibration_without_a_linear_head():
    linear, _ = calibrated()
    alone, _ = calibrated(head=None)
    assert alone.map.source == "logits"
    assert alone.error[2.0].gradient == pytest.approx(linear.error[2.0].gradient, rel=0.2)
    capped, _ = calibrated(head=Head(mx.array(weights()), softcap=30.0))
    assert capped.map.source == "logits"


def test_a_finer_step_means_less_error():
    coarse, fine = (calibrated(step=step)[0].error[2.0].gradient for step in (8.0, 0.5))
    assert fine < coarse


def test_calibration_needs_tokens():
    head = Head(mx.array(weights()))
    some, empty = sample(60, seed=1, head=head), sample(0, seed=1, head=head)
    with pytest.raises(UsageError, match="found 60 and 0"):
        calibrate(some, empty, SPEC, rank=4, step=1.0, head=head)
    with pytest.raises(UsageError, match="at least the sketch rank 12, found 5"):
        calibrate(sample(5, seed=1, head=head), some, SPEC, rank=12, step=1.0, head=head)


def test_thinning_keeps_ids_with_their_rows():
    head = Head(mx.array(weights()))
    whole = sample(100, seed=3, head=head)
    thin = whole.thinned(7)
    assert len(thin) == 7
    for row, token in zip(thin.states, thin.token_ids, strict=True):
        place = int(np.flatnonzero((whole.states == row).all(axis=1))[0])
        assert whole.token_ids[place] == token


def test_familiar_text_keeps_its_basis():
    calibration, head = calibrated()
    chosen = DriftMonitor(calibration, head).choose(
        sample(200, seed=7, head=head), sample(100, seed=8, head=head)
    )
    assert chosen.basis is calibration.basis
    assert chosen.error != calibration.error


def test_strange_text_is_noticed_and_refitted():
    calibration, head = calibrated()
    monitor = DriftMonitor(calibration, head)
    fit, held = sample(300, seed=7, turn=1, head=head), sample(100, seed=8, turn=1, head=head)
    old = Codec(SPEC, calibration.basis, calibration.codebook)
    before = measure(held, old, calibration.map)
    assert monitor.drifted(before)
    chosen = monitor.choose(fit, held)
    assert chosen.basis.to_bytes() != calibration.basis.to_bytes()
    assert chosen.error[2.0].kl < 0.7 * before[2.0].kl
    assert monitor.choose(fit, held).basis.to_bytes() == chosen.basis.to_bytes()


def test_beside_a_gpu_the_fit_runs_on_a_thread_without_mlx(monkeypatch):
    calibration, head = calibrated()
    fit, held = sample(300, seed=7, turn=1, head=head), sample(100, seed=8, turn=1, head=head)
    expected = DriftMonitor(calibration, head).choose(fit, held)
    seen = {}

    def watched(name):
        function = getattr(calibrate_module, name)

        def run(*arguments, **named):
            seen[name] = (threading.current_thread().name, [type(a) for a in arguments])
            return function(*arguments, **named)

        monkeypatch.setattr(calibrate_module, name, run)

    watched("fit_basis_linear")
    watched("with_predictor")
    monkeypatch.setattr(calibrate_module, "on_gpu", lambda: True)
    work = Underway(DriftMonitor(calibration, head).choosing(fit, held))
    pauses = 0
    while work.step():
        pauses += 1
    assert pauses >= 6
    assert work.result().error[2.0].kl == pytest.approx(expected.error[2.0].kl, rel=0.02)
    for thread, types in seen.values():
        assert thread.startswith("beside")
        assert mx.array not in types
    assert len(seen) == 2
