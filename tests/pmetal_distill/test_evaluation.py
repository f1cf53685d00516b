"""`Comparison` against float64 NumPy, dense and obvious."""

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.evaluation import Comparison, compare_hidden


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 37, 21)
    labels[[0, 5, 20]] = -100
    return (
        rng.normal(0, 4, (21, 37)).astype("f4"),
        rng.normal(0, 4, (21, 37)).astype("f4"),
        labels.astype("i4"),
    )


def test_summary_equals_dense_float64(rows: tuple[np.ndarray, ...]) -> None:
    teacher, student, labels = rows
    comparison = Comparison(temperatures=(1.0, 2.5))
    for part in (slice(0, 4), slice(4, 21)):
        comparison.add(*(mx.array(a[part]) for a in rows))
    got = comparison.summary()
    for t in (1.0, 2.5):
        log_p, log_q = log_softmax(teacher / t), log_softmax(student / t)
        assert got[f"kl@{t:g}"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-5)
    order = np.argsort(-student, axis=-1)
    best = teacher.argmax(-1)
    assert got["top1"] == pytest.approx(np.mean(order[:, 0] == best))
    assert got["top5"] == pytest.approx(np.mean((order[:, :5] == best[:, None]).any(-1)))
    keep = labels >= 0
    for name, logits in (("perplexity", student), ("teacher_perplexity", teacher)):
        nll = -log_softmax(logits)[keep, labels[keep]]
        assert got[name] == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert got["tokens"] == 21


def test_a_model_agrees_with_itself(rows: tuple[np.ndarray, ...]) -> None:
    comparison = Comparison(temperatures=(1.0,))
    comparison.add(mx.array(rows[0]), mx.array(rows[0]), mx.array(rows[2]))
    got = comparison.summary()
    assert got["kl@1"] == pytest.approx(0.0, abs=1e-6)
    assert got["top1"] == got["top5"] == 1.0


def test_padded_vocabularies_compare_on_their_common_columns(rows: tuple[np.ndarray, ...]) -> None:
    plain, padded = Comparison(temperatures=(1.0,)), Comparison(temperatures=(1.0,))
    plain.add(*(mx.array(a) for a in rows))
    wider = np.concatenate([rows[1], np.full((21, 5), 50.0, "f4")], axis=1)
    padded.add(mx.array(rows[0]), mx.array(wider), mx.array(rows[2]))
    assert padded.summary() == plain.summary()


def test_chunked_hidden_states_equal_one_pass(rows: tuple[np.ndarray, ...]) -> None:
    whole, chunked = Comparison(temperatures=(2.0,)), Comparison(temperatures=(2.0,))
    whole.add(*(mx.array(a) for a in rows))
    compare_hidden(
        chunked,
        teacher_head=lambda h: h,
        teacher_hidden=mx.array(rows[0]),
        student_head=lambda h: h,
        student_hidden=mx.array(rows[1]),
        labels=mx.array(rows[2]),
        chunk_size=4,
    )
    assert chunked.summary() == pytest.approx(whole.summary(), rel=1e-6)
