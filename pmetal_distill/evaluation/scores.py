"""What two models say about each token, as a few numbers a token. Costs a read of both rows a temperature.

On the CPU the reductions run in NumPy, a few rows at a time, whose `exp` is an order of magnitude faster than
MLX's there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.device import on_cpu
from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses.job import TokenRows

_CPU_BLOCK_ROWS = 8
_CPU_ROWS = 256
_GPU_BYTES = 1 << 28  # of one model's float32 logits; about eight arrays of that size exist at once
Float = npt.NDArray[np.floating[Any]]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """Numbers about n tokens. A first choice is the largest logit, the lowest id among equal ones.

    Attributes:
        kl: [temperatures, n], KL(teacher || student), nats.
        student_nll: [n], -log probability of the label, nats; 0 where there is none.
        labelled: [n], whether there is a label.
        teacher_rank: [n], tokens that the student puts above the teacher's first choice.
        confidence: [n], the student's largest probability at T=1.
        right: [n], whether no token is above the label; false where there is none.
        teacher_nll: as `student_nll`; None if the teacher's probabilities are not known token by token.
        teacher_probability: [n], the teacher's, at T=1, of the student's first choice; None as above.
    """

    kl: Float
    student_nll: Float
    labelled: Bool
    teacher_rank: Float
    confidence: Float
    right: Bool
    teacher_nll: Float | None = None
    teacher_probability: Float | None = None

    def __len__(self) -> int:
        return len(self.labelled)

    @staticmethod
    def of_rows(rows: TokenRows, labels: npt.NDArray[np.int32], mask: Bool) -> "TokenScores":
        """Scores of the tokens inside a mask, out of what a pass over targets found.

        Args:
            rows: of N tokens, their questions all forward KL.
            labels, mask: [N].
        """
        soft, hard, confidence, teacher_rank, label_rank = (np.asarray(part)[..., mask] for part in rows)
        labelled = labels[mask] != IGNORE_INDEX
        return TokenScores(soft, hard, labelled, teacher_rank, confidence, labelled & (label_rank < 1))


def rows_to_compare(vocab_size: int) -> int:
    """Rows whose logits are compared at once where nobody asked for a number."""
    return _CPU_ROWS if on_cpu() else max(_CPU_ROWS, _GPU_BYTES // (4 * vocab_size))


def score_logits(
    teacher_logits: mx.array, student_logits: mx.array, labels: mx.array, temperatures: Sequence[float]
) -> TokenScores:
    """Scores of tokens of which both models' logits are known.

    Args:
        teacher_logits: [n, V], any float type.
        student_logits: [n, V]; of vocabularies padded differently the columns that both have.
        labels: [n], the next token or -100 where there is none.
        temperatures: where KL is taken, each > 0.
    """
    vocab = min(teacher_logits.shape[-1], student_logits.shape[-1])
    xp, views = _views(teacher_logits[:, :vocab], student_logits[:, :vocab], labels)
    rows = _CPU_BLOCK_ROWS if xp is np else max(1, len(views[0]))
    starts = range(0, max(1, len(views[0])), rows)
    blocks = [_block(xp, [view[i : i + rows] for view in views], temperatures) for i in starts]
    names = [f.name for f in fields(TokenScores)]
    return TokenScores(*(np.concatenate([b[name] for b in blocks], axis=-1) for name in names))


def _views(teacher: mx.array, student: mx.array, labels: mx.array) -> tuple[ModuleType, tuple[Any, Any, Any]]:
    teacher, student = teacher.astype(mx.float32), student.astype(mx.float32)
    if not on_cpu():
        return mx, (teacher, student, labels)
    mx.eval(teacher, student, labels)
    return np, (np.array(teacher, copy=False), np.array(student, copy=False), np.array(labels, copy=False))


def _block(xp: ModuleType, views: Sequence[Any], temperatures: Sequence[float]) -> dict[str, Any]:
    teacher, student, labels = views
    labelled = labels != IGNORE_INDEX
    safe = xp.where(labelled, labels, 0)
    teacher_lse, student_lse = _logsumexp(xp, teacher), _logsumexp(xp, student)
    # As int32, for MLX on CUDA builds a kernel for every type of index.
    best, first = (xp.argmax(z, axis=-1).astype(xp.int32) for z in (teacher, student))
    at_label = _at(xp, student, safe)
    found = {
        "kl": xp.stack([_forward_kl(xp, teacher, student, t) for t in temperatures]),
        "student_nll": (student_lse - at_label) * labelled,
        "labelled": labelled,
        "teacher_rank": (student > _at(xp, student, best)[:, None]).sum(axis=-1),
        "confidence": xp.exp(_at(xp, student, first) - student_lse),
        "right": labelled & ((student > at_label[:, None]).sum(axis=-1) < 1),
        "teacher_nll": (teacher_lse - _at(xp, teacher, safe)) * labelled,
        "teacher_probability": xp.exp(_at(xp, teacher, first) - teacher_lse),
    }
    if xp is mx:
        mx.eval(found)
    return {name: np.array(value) for name, value in found.items()}


def _forward_kl(xp: ModuleType, teacher: Any, student: Any, temperature: float) -> Any:
    teacher_shifted = (teacher - teacher.max(axis=-1, keepdims=True)) / temperature
    student_shifted = (student - student.max(axis=-1, keepdims=True)) / temperature
    p = xp.exp(teacher_shifted)
    total = p.sum(axis=-1)
    cross = (p * (teacher_shifted - student_shifted)).sum(axis=-1) / total
    return cross - xp.log(total) + xp.log(xp.exp(student_shifted).sum(axis=-1))


def _logsumexp(xp: ModuleType, logits: Any) -> Any:
    top = logits.max(axis=-1)
    return top + xp.log(xp.exp(logits - top[:, None]).sum(axis=-1))


def _at(xp: ModuleType, logits: Any, tokens: Any) -> Any:
    return xp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
