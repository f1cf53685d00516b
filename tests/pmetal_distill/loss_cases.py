"""Random targets and student logits of every kind, with what the float64 reference says about them."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from pmetal_distill.losses.divergences import LOSS_NAMES, Divergence
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TargetKind, TeacherTarget
from schemas.curve import TailCurve
from tests import reference

NODES = (0.125, 0.4, 0.7, 1.0, 1.4, 1.8, 2.0)
KINDS: tuple[TargetKind, ...] = ("dense", "none", "bucket", "sketch")
STYLES = ("normal", "extreme", "ties", "peaked", "flat", "huge")


def draw_logits(rng: np.random.Generator, shape: tuple[int, int], style: str) -> np.ndarray:
    """Logits [n, V]: extreme is +-1e4; ties are few distinct values; peaked has no tail; flat is all tail."""
    noise = rng.standard_normal(shape)
    if style == "extreme":
        noise = rng.choice([-1e4, 0.0, 1e4], shape) + noise
    elif style == "ties":
        noise = np.round(noise)
    elif style == "peaked":
        noise[:, rng.integers(shape[1])] += 300.0
    elif style == "flat":
        noise *= 1e-3
    elif style == "huge":
        noise = 1e4 + 3 * noise
    else:
        noise *= 3
    return noise.astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A target with the student's logits, and the reference's view of the same.

    Attributes:
        target: the package's object.
        events: reference log-probabilities at `temperature`, [n, V] or [n, k+1].
        ids: head for events of k+1, None for complete targets.
        student: float32 [n, V].
        labels: int32 [n], some -100.
        mask: float32 [n], 0 or 1.
    """

    kind: TargetKind
    target: TeacherTarget
    events: np.ndarray
    ids: np.ndarray | None
    student: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    temperature: float
    divergence: Divergence

    def soft(self, logits: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Reference value per token and gradient, of the student's logits or of others."""
        assert self.divergence.parameter is not None
        return reference.loss_and_gradient(
            self.divergence.name,
            self.events,
            self.student if logits is None else logits,
            self.temperature,
            ids=self.ids,
            parameter=self.divergence.parameter,
        )


def smooth(case: Case) -> bool:
    """Whether the loss is differentiable at the student, further than rounding reaches."""
    if case.divergence.name != "total_variation":
        return True
    logq = reference.log_softmax(case.student, case.temperature)
    q = np.exp(logq if case.ids is None else reference.to_events(logq, case.ids))
    gap = np.abs(q - np.exp(case.events))
    return bool((gap > 1e-5 * q)[q > 1e-7].all())


def make_target(
    kind: TargetKind, teacher: np.ndarray, *, k: int, temperature: float, rng: np.random.Generator
) -> tuple[TeacherTarget, np.ndarray, np.ndarray | None]:
    """The target of teacher logits [n, V], its reference events, and the head if these need it."""
    vocab = teacher.shape[-1]
    if kind == "dense":
        return TeacherTarget.dense(mx.array(teacher)), reference.log_softmax(teacher, temperature), None
    k = min(k, vocab) if kind == "none" else min(k, vocab - 1)
    ids = reference.top_k(teacher, k)
    head = np.take_along_axis(reference.log_softmax(teacher), ids, axis=-1).astype(np.float32)
    if kind == "none":
        events = np.full((len(ids), k + 1), -np.inf)
        events[:, :k] = reference.log_softmax(head, temperature)
        return TeacherTarget.none(mx.array(ids), mx.array(head), vocab_size=vocab), events, ids
    curve = TailCurve(NODES, vocab, k)
    values = reference.tail_values(teacher, ids, NODES).astype(np.float32)
    at_b = reference.curve_at(values, NODES, np.log(vocab - k), 1 / temperature)
    events = reference.bucket_logprobs(head.astype(np.float64), at_b, temperature)
    if kind == "bucket":
        return TeacherTarget.bucket(mx.array(ids), mx.array(head), mx.array(values), curve=curve), events, ids
    rank = int(min(5, vocab))
    mean, parts, y = (
        rng.standard_normal(s).astype(np.float32) for s in ((vocab,), (vocab, rank), (len(ids), rank))
    )
    target = TeacherTarget.sketch(
        mx.array(ids), mx.array(head), mx.array(values), mx.array(y),
        curve=curve, bases=[TailBasis(mx.array(mean), mx.array(parts))],
    )  # fmt: skip
    tail = mean.astype(np.float64) + y.astype(np.float64) @ parts.astype(np.float64).T
    return target, reference.sketch_logprobs(events, ids, tail, temperature), None


def make_case(
    kind: TargetKind,
    divergence: Divergence,
    *,
    vocab: int,
    k: int,
    num_tokens: int = 3,
    temperature: float = 2.0,
    teacher_style: str = "normal",
    student_style: str = "normal",
    seed: int = 0,
) -> Case:
    """A case from explicit choices; the arrays are a pure function of them."""
    rng = np.random.default_rng(seed)
    teacher = draw_logits(rng, (num_tokens, vocab), teacher_style)
    student = draw_logits(rng, (num_tokens, vocab), student_style)
    target, events, ids = make_target(kind, teacher, k=k, temperature=temperature, rng=rng)
    labels = rng.integers(0, vocab, num_tokens).astype(np.int32)
    labels[rng.random(num_tokens) < 0.3] = -100
    mask = (rng.random(num_tokens) < 0.7).astype(np.float32)
    return Case(kind, target, events, ids, student, labels, mask, temperature, divergence)


@st.composite
def case_options(
    draw: Any, kinds: tuple[TargetKind, ...] = KINDS, styles: tuple[str, ...] = STYLES
) -> dict[str, Any]:
    """Arguments of `make_case`: any meaningful combination of kind, loss, sizes, temperature and logits."""
    kind = draw(st.sampled_from(kinds))
    names = [n for n in LOSS_NAMES if not (kind == "none" and n == "reverse_kl")]
    vocab = draw(st.one_of(st.integers(7, 60), st.integers(61, 5000)))
    return {
        "kind": kind,
        "divergence": Divergence(draw(st.sampled_from(names)), draw(st.sampled_from([0.1, 0.5, 0.9]))),
        "vocab": vocab,
        "k": draw(st.one_of(st.integers(1, 64), st.just(vocab))),
        "num_tokens": draw(st.integers(1, 9)),
        "temperature": draw(st.one_of(st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]), st.floats(0.5, 8.0))),
        "teacher_style": draw(st.sampled_from(styles)),
        "student_style": draw(st.sampled_from(styles)),
        "seed": draw(st.integers(0, 2**31)),
    }


def assert_close(
    found: np.ndarray, expected: np.ndarray, *, relative: float = 1e-5, absolute: float = 1e-6
) -> None:
    """Values of losses: finite, and equal within rounding."""
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=relative, atol=absolute)
