"""`Comparison` against float64 NumPy, dense and obvious, token by token."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.evaluation import (
    Comparison,
    Question,
    Reliability,
    TokenScores,
    compare_hidden,
    document_positions,
    target_rows,
)
from pmetal_distill.losses import Divergence
from pmetal_distill.models import load_model
from pmetal_distill.teaching import LiveTeacher, TextBatch


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


def tied(seed: int = 5, tokens: int = 400, vocab: int = 23) -> tuple[np.ndarray, ...]:
    """Logits on a coarse grid, so that first choices are often shared, and rows that are all equal."""
    rng = np.random.default_rng(seed)
    teacher, student = (np.round(rng.normal(0, 1.5, (tokens, vocab))).astype("f4") for _ in range(2))
    student[:7] = 0.0
    labels = rng.integers(0, vocab, tokens).astype("i4")
    labels[rng.random(tokens) < 0.2] = -100
    return teacher, student, labels


def slow_calibration(confidence: list[float], outcome: list[float]) -> tuple[float, list[dict[str, float]]]:
    """Guo et al. 2017, formula (3), one prediction at a time."""
    members: dict[int, list[tuple[float, float]]] = {}
    for c, o in zip(confidence, outcome, strict=True):
        members.setdefault(next(m for m in range(15) if c <= (m + 1) / 15 + 1e-12), []).append((c, o))
    error, bins = 0.0, []
    for m, pairs in sorted(members.items()):
        mean_c, mean_o = np.mean(pairs, axis=0)
        error += len(pairs) / len(confidence) * abs(mean_c - mean_o)
        bins.append(
            {
                "above": m / 15,
                "up_to": (m + 1) / 15,
                "tokens": len(pairs),
                "confidence": mean_c,
                "accuracy": mean_o,
            }
        )
    return error, bins


def test_calibration_against_text_and_teacher_equals_the_slow_path() -> None:
    teacher, student, labels = tied()
    p, q = np.exp(log_softmax(teacher)), np.exp(log_softmax(student))
    by_label: tuple[list[float], list[float]] = ([], [])
    by_teacher: tuple[list[float], list[float]] = ([], [])
    for n, label in enumerate(labels):
        first = int(student[n].argmax())
        by_teacher[0].append(q[n].max())
        by_teacher[1].append(p[n, first])
        if label >= 0:
            by_label[0].append(q[n].max())
            by_label[1].append(float(student[n, label] == student[n].max()))
    comparison = Comparison(temperatures=(1.0,))
    comparison.add(*(mx.array(a) for a in (teacher, student, labels)))
    got = comparison.report()
    for name, diagram, (confidence, outcome) in (
        ("ece", "reliability", by_label),
        ("ece_teacher", "reliability_teacher", by_teacher),
    ):
        error, bins = slow_calibration(confidence, outcome)
        assert got[name] == pytest.approx(error, rel=1e-5)
        assert len(bins) > 3
        for found, expected in zip(got[diagram], bins, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def test_tied_logits_agree_when_the_teachers_choice_is_among_the_best() -> None:
    teacher, student, labels = tied()
    comparison = Comparison(temperatures=(2.0,))
    comparison.add(*(mx.array(a) for a in (teacher, student, labels)))
    best = teacher.argmax(-1)
    above = [(row > row[b]).sum() for row, b in zip(student, best, strict=True)]
    got = comparison.summary()
    assert got["top1"] == pytest.approx(np.mean([n == 0 for n in above]))
    assert got["top5"] == pytest.approx(np.mean([n < 5 for n in above]))
    log_p, log_q = log_softmax(teacher / 2), log_softmax(student / 2)
    assert got["kl@2"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-5)


def test_a_copy_of_the_teacher_is_calibrated_against_it_but_not_against_the_text() -> None:
    teacher, _, labels = tied()
    comparison = Comparison(temperatures=(1.0,))
    comparison.add(mx.array(teacher), mx.array(teacher), mx.array(labels))
    got = comparison.summary()
    assert got["ece_teacher"] == pytest.approx(0.0, abs=1e-6)
    assert got["ece"] > 0.1


@pytest.mark.parametrize(
    ("confidence", "number"), [(0.0, 1), (1 / 15, 1), (0.0667, 2), (0.999, 15), (1.0, 15)]
)
def test_a_bin_holds_its_upper_bound(confidence: float, number: int) -> None:
    bins = Reliability()
    bins.add(np.array([confidence]), np.array([1.0]))
    (only,) = bins.bins()
    assert only["up_to"] == number / 15
    assert bins.error == pytest.approx(1 - confidence)


def test_groups_by_position_and_kind_are_the_tokens_of_each() -> None:
    teacher, student, labels = tied(tokens=90)
    rng = np.random.default_rng(0)
    positions = rng.choice([0, 15, 16, 63, 64, 255, 256, 1023, 1024, 5000], 90)
    kinds = rng.integers(0, 2, 90) * 2
    comparison = Comparison(temperatures=(1.0, 3.0), kinds=("code", "nothing", "prose"))
    for part in (slice(0, 40), slice(40, 90)):
        chunk = (mx.array(a[part]) for a in (teacher, student, labels))
        comparison.add(*chunk, positions=positions[part], kinds=kinds[part])
    got = comparison.report()
    bounds = ((0, 15), (16, 63), (64, 255), (256, 1023), (1024, 4095), (4096, 16383))
    groups = {f"{a}-{b}": (positions >= a) & (positions <= b) for a, b in bounds}
    assert [row["position"] for row in got["by_position"]] == list(groups)
    assert [row["kind"] for row in got["by_kind"]] == ["code", "prose"]
    rows = [*got["by_position"], *got["by_kind"]]
    expected = [*groups.items(), ("code", kinds == 0), ("prose", kinds == 2)]
    for row, (name, chosen) in zip(rows, expected, strict=True):
        alone = Comparison(temperatures=(1.0, 3.0))
        alone.add(*(mx.array(a[chosen]) for a in (teacher, student, labels)))
        summary = {k: v for k, v in alone.summary().items() if not k.startswith("ece")}
        assert row.pop("position" if "position" in row else "kind") == name
        assert row == pytest.approx(summary, rel=1e-9)


def test_positions_count_from_the_start_of_each_document() -> None:
    documents = np.array([[3, 3, 3, 5, 5, 1, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0]], np.int32)
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert document_positions(documents).tolist() == expected


def test_gpus_take_the_same_formulas_in_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = [mx.array(a) for a in tied()]
    host, device = Comparison((1.0, 2.0)), Comparison((1.0, 2.0))
    host.add(*chunk)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    device.add(*chunk)
    assert device.summary() == pytest.approx(host.summary(), rel=1e-5)


def test_no_token_at_all_is_reported_as_such() -> None:
    comparison = Comparison(temperatures=(1.0,))
    comparison.add(mx.zeros((0, 5)), mx.zeros((0, 5)), mx.zeros((0,), mx.int32))
    assert comparison.summary() == {"tokens": 0}
    assert comparison.report() == {"tokens": 0}


class TestTargets:
    """Scores from a teacher's targets, against those from both models' logits."""

    def scores(self, student: Any, teacher: Any, batch: Any) -> TokenScores:
        questions = [Question(Divergence("forward_kl"), t) for t in (1.0, 2.0)]
        rows = target_rows(student, teacher, batch, questions, chunk_tokens=7)
        return TokenScores.of_rows(rows, batch.labels.reshape(-1), batch.loss_mask.reshape(-1))

    def test_a_live_teachers_targets_score_as_its_logits(
        self, tiny_teacher: Path, tiny_student: Path
    ) -> None:
        teacher, student = load_model(tiny_teacher), load_model(tiny_student)
        ids = np.random.default_rng(1).integers(0, 320, (3, 20)).astype(np.int32)
        batch = TextBatch.of(ids)
        by_target, by_logits = Comparison((1.0, 2.0)), Comparison((1.0, 2.0))
        by_target.add_scores(self.scores(student, LiveTeacher(teacher, 320), batch))
        mask = mx.array(np.flatnonzero(batch.loss_mask))
        logits = [m.full(mx.array(ids)).reshape(-1, 320)[mask] for m in (teacher, student)]
        by_logits.add(*logits, mx.array(batch.labels.reshape(-1))[mask])
        expected = by_logits.summary()
        del expected["teacher_perplexity"], expected["ece_teacher"]
        assert by_target.summary() == pytest.approx(expected, rel=1e-4)

    def test_answers_come_in_the_order_of_the_questions(self, tiny_teacher: Path, tiny_student: Path) -> None:
        teacher, student = LiveTeacher(load_model(tiny_teacher), 320), load_model(tiny_student)
        batch = TextBatch.of(np.arange(12).reshape(1, 12))
        forward, reverse = Divergence("forward_kl"), Divergence("reverse_kl")
        asked = [
            Question(forward, 1.0),
            Question(reverse, 2.0),
            Question(forward, 2.0),
            Question(forward, 1.0),
        ]
        together = target_rows(student, teacher, batch, asked)
        for number, question in enumerate(asked):
            alone = target_rows(student, teacher, batch, [question])
            np.testing.assert_array_equal(np.array(together.soft[number]), np.array(alone.soft[0]))
        np.testing.assert_array_equal(np.array(together.hard), np.array(alone.hard))
