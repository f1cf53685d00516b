"""The losses on kernels equal the losses on plain operations: every target, divergence and temperature."""

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.kernels import capture, engaged, ops
from pmetal_distill.losses import divergences
from pmetal_distill.losses.chunk import PLAIN_OPS, Chunk, RowOps
from pmetal_distill.losses.chunked_head import HeadOptions, head_loss
from pmetal_distill.losses.divergences import LOSS_NAMES, Divergence, Events, Terms
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.target import SoftTarget, TailBasis, TeacherTarget
from schemas.curve import TailCurve
from schemas.spec import DEFAULT_NODES
from tests.kernels import tools

KINDS = ("dense", "none", "bucket", "sketch", "sketch with a ceiling")
ROWS = 5


def _target(kind: str, vocab: int, k: int) -> TeacherTarget:
    t = tools.logits(ROWS, vocab, mx.float32, seed=4)
    if kind == "dense":
        return TeacherTarget.dense(t)
    found = capture(t, k=k, nodes=DEFAULT_NODES)
    logprobs = found.scores - found.lse[:, None]
    if kind == "none":
        return TeacherTarget.none(found.ids, logprobs, vocab_size=vocab)
    curve = TailCurve(DEFAULT_NODES, vocab, k)
    if kind == "bucket":
        return TeacherTarget.bucket(found.ids, logprobs, found.curve, curve=curve)
    ceiling = (tools.vector(8, 6), 0.0) if kind != "sketch" else ()
    basis = TailBasis(tools.vector(vocab, 1), tools.vector(vocab, 2, 8), *ceiling)
    y = tools.vector(ROWS, 3, 8)
    return TeacherTarget.sketch(found.ids, logprobs, found.curve, y, curve=curve, bases=[basis])


def _run(z: mx.array, target: SoftTarget, divergence: Divergence, row_ops: RowOps) -> list[mx.array]:
    labels = mx.array([0, z.shape[-1] - 1, -100, 3, 2])
    chunk = Chunk.of(target, labels, divergence, row_ops)
    statistics = chunk.statistics(z)
    soft, hard = mx.abs(tools.vector(ROWS, 5)), mx.abs(tools.vector(ROWS, 6))
    rows = chunk.gradient(z, statistics, soft=soft, hard=hard)
    found = [chunk.soft(statistics), chunk.hard(statistics), mx.exp(-statistics.lse), rows]
    mx.eval(found)
    return found


def _distance(a: mx.array, b: mx.array) -> float:
    x, y = tools.float64(a), tools.float64(b)
    return float(np.abs(x - y).max() / (1e-6 + np.abs(y).max()))


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_plain_operations(kind: str, name: str) -> None:
    if kind == "none" and name == "reverse_kl":
        pytest.skip("refused for this kind of target")
    for vocab, k in ((7, 3), (1023, 9), (4097, 16)):
        z, target = tools.logits(ROWS, vocab, mx.float32), _target(kind, vocab, k)
        for number, temperature in enumerate((1.0, 2.0, 1.5)):
            soft = target.at(temperature)
            plain = _run(z, soft, Divergence(name), PLAIN_OPS)
            with tools.emulated(tools.SCHEDULES[number + 1]):
                ours = _run(z, soft, Divergence(name), ops)
            errors = [_distance(a, b) for a, b in zip(ours, plain, strict=True)]
            assert max(errors) < 5e-6, (vocab, temperature, errors)
    assert engaged()["tail_sums_grad" if kind in ("none", "bucket") else "pair_grad"] == 9


def _squared_distance(xp: Any, e: Events, _: float) -> Terms:
    return Terms((e.q - e.p) ** 2, 2 * e.q * (e.q - e.p))


@pytest.mark.parametrize("kind", ["dense", "sketch"])
def test_a_divergence_that_no_kernel_knows_means_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(divergences._REGISTRY, "squared", divergences._Entry(_squared_distance))
    z, soft = tools.logits(ROWS, 1023, mx.float32), _target(kind, 1023, 9).at(2.0)
    plain = _run(z, soft, Divergence("squared"), PLAIN_OPS)
    with tools.emulated():
        ours = _run(z, soft, Divergence("squared"), ops)
    assert max(_distance(a, b) for a, b in zip(ours, plain, strict=True)) < 5e-6


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_logits_give_gradients_of_their_type(dtype: mx.Dtype) -> None:
    z = tools.logits(ROWS, 1023, dtype)
    for kind in ("bucket", "sketch"):
        soft = _target(kind, 1023, 9).at(2.0)
        plain = _run(z, soft, Divergence(), PLAIN_OPS)
        with tools.emulated():
            ours = _run(z, soft, Divergence(), ops)
        assert ours[3].dtype == dtype
        assert max(_distance(a, b) for a, b in zip(ours[:3], plain[:3], strict=True)) < 5e-6
        assert _distance(ours[3], plain[3]) < tools.GRAIN[dtype]


def test_equal_rows_have_no_divergence_and_no_gradient() -> None:
    z = tools.logits(ROWS, 1023, mx.float32)
    soft = TeacherTarget.dense(z).at(2.0)
    for name in LOSS_NAMES:
        if name in ("soft_cross_entropy", "total_variation"):  # no minimum, a kink
            continue
        chunk = Chunk.of(soft, mx.full((ROWS,), -100), Divergence(name), ops)
        one, zero = mx.ones((ROWS,)), mx.zeros((ROWS,))
        with tools.emulated():
            chunk = dataclasses.replace(chunk, teacher=ops.teacher_rows(soft))
            statistics = chunk.statistics(z)
            rows = chunk.gradient(z, statistics, soft=one, hard=zero)
            mx.eval(rows)
        assert np.abs(np.array(chunk.soft(statistics))).max() < 1e-6, name
        assert np.abs(np.array(rows)).max() < 1e-6, name


def _head_step(row_ops: RowOps, target: SoftTarget, hidden: mx.array, weight: mx.array) -> Any:
    labels = mx.array([0, 900, -100, 3, 2])
    mask = mx.array([1.0, 1.0, 0.0, 1.0, 1.0])

    def loss(h: mx.array, w: mx.array) -> mx.array:
        options = HeadOptions(chunk_tokens=2, backend="plain", ops=row_ops)
        return head_loss(h, HeadParts(w), target, labels, mask, options=options).total

    found = mx.value_and_grad(loss, (0, 1))(hidden, weight)
    mx.eval(found)
    return found


@pytest.mark.parametrize("kind", ["bucket", "sketch"])
def test_the_chunked_head_trains_on_kernels(kind: str) -> None:
    hidden, weight = tools.vector(ROWS, 7, 24), tools.vector(1023, 8, 24)
    target = _target(kind, 1023, 9).at(2.0)
    value, (by_hidden, by_weight) = _head_step(PLAIN_OPS, target, hidden, weight)
    assert not engaged()
    with tools.emulated():
        ours, (our_hidden, our_weight) = _head_step(ops, target, hidden, weight)
    assert engaged()["tail_sums_grad" if kind == "bucket" else "pair_grad"] == 3
    assert abs(ours.item() / value.item() - 1) < 1e-5
    assert _distance(our_hidden, by_hidden) < 1e-5
    assert _distance(our_weight, by_weight) < 1e-5
