"""How close a student is to its teacher on given text: divergence, agreement, perplexity.

Costs one forward pass of each model and, per token, one read of both rows of logits per temperature. Rows are
made in chunks, so [tokens, vocabulary] never exists at once. On the CPU the reductions run in NumPy, whose
`exp` is an order of magnitude faster there than MLX's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

IGNORE_INDEX = -100
_CPU_BLOCK_ROWS = 8
_TOP = 5


@dataclass(slots=True)
class Comparison:
    """Sums over tokens of what two models say about them; `summary()` gives the means.

    Args:
        temperatures: softmax temperatures at which KL(teacher || student) is taken, each > 0.
    """

    temperatures: Sequence[float]
    tokens: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0
    teacher_nll: float = 0.0
    student_nll: float = 0.0
    kl: list[float] = field(default_factory=list)

    def add(self, teacher_logits: mx.array, student_logits: mx.array, labels: mx.array) -> None:
        """Adds a chunk.

        Args:
            teacher_logits: [tokens, vocab], any float type.
            student_logits: [tokens, vocab]; of vocabularies padded differently the columns that both have.
            labels: [tokens], the next token or -100 where there is none.
        """
        vocab = min(teacher_logits.shape[-1], student_logits.shape[-1])
        xp, views = _views(teacher_logits[:, :vocab], student_logits[:, :vocab], labels)
        rows = _CPU_BLOCK_ROWS if xp is np else len(views[0])
        for start in range(0, len(views[0]), rows):
            self._add_block(xp, *(view[start : start + rows] for view in views))

    def _add_block(self, xp: ModuleType, teacher: Any, student: Any, labels: Any) -> None:
        kl = [_forward_kl(xp, teacher, student, temperature) for temperature in self.temperatures]
        has_label = labels != IGNORE_INDEX
        safe = xp.where(has_label, labels, 0)[:, None]
        nlls = [_nll(xp, logits, safe) * has_label for logits in (teacher, student)]
        best = xp.argmax(teacher, axis=-1)[:, None]
        rank = (student > xp.take_along_axis(student, best, axis=-1)).sum(axis=-1)
        sums = [float(value.sum()) for value in (*kl, *nlls, rank < 1, rank < _TOP, has_label)]
        self.kl = [a + b for a, b in zip(self.kl or [0.0] * len(kl), sums, strict=False)]
        teacher_nll, student_nll, top1, top5, labelled = sums[len(kl) :]
        self.teacher_nll += teacher_nll
        self.student_nll += student_nll
        self.top1 += int(top1)
        self.top5 += int(top5)
        self.labelled += int(labelled)
        self.tokens += len(teacher)

    def summary(self) -> dict[str, float]:
        """Means over tokens: `kl@T` in nats, agreement `top1` and `top5`, perplexities, `tokens`."""
        tokens, labelled = max(self.tokens, 1), max(self.labelled, 1)
        kl = (
            {f"kl@{t:g}": total / tokens for t, total in zip(self.temperatures, self.kl, strict=True)}
            if self.kl
            else {}
        )
        return {
            **kl,
            "top1": self.top1 / tokens,
            "top5": self.top5 / tokens,
            "perplexity": float(np.exp(self.student_nll / labelled)),
            "teacher_perplexity": float(np.exp(self.teacher_nll / labelled)),
            "tokens": self.tokens,
        }


def compare_hidden(
    comparison: Comparison,
    *,
    teacher_head: Callable[[mx.array], mx.array],
    teacher_hidden: mx.array,
    student_head: Callable[[mx.array], mx.array],
    student_hidden: mx.array,
    labels: mx.array,
    chunk_size: int = 256,
) -> None:
    """Adds rows given as final hidden states; logits are made `chunk_size` rows at a time.

    Args:
        comparison: where the sums go.
        teacher_head, student_head: hidden [tokens, d] -> logits [tokens, vocab].
        teacher_hidden, student_hidden: [tokens, d], after the final norm; the widths may differ.
        labels: [tokens], -100 where there is no next token.
        chunk_size: rows of logits alive at once.
    """
    for start in range(0, teacher_hidden.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        comparison.add(teacher_head(teacher_hidden[rows]), student_head(student_hidden[rows]), labels[rows])


def _views(teacher: mx.array, student: mx.array, labels: mx.array) -> tuple[ModuleType, tuple[Any, Any, Any]]:
    teacher, student = teacher.astype(mx.float32), student.astype(mx.float32)
    if mx.default_device() != mx.Device(mx.cpu):
        return mx, (teacher, student, labels)
    mx.eval(teacher, student, labels)
    return np, (np.array(teacher, copy=False), np.array(student, copy=False), np.array(labels, copy=False))


def _forward_kl(xp: ModuleType, teacher: Any, student: Any, temperature: float) -> Any:
    teacher_shifted = (teacher - teacher.max(axis=-1, keepdims=True)) / temperature
    student_shifted = (student - student.max(axis=-1, keepdims=True)) / temperature
    p = xp.exp(teacher_shifted)
    total = p.sum(axis=-1)
    cross = (p * (teacher_shifted - student_shifted)).sum(axis=-1) / total
    return cross - xp.log(total) + xp.log(xp.exp(student_shifted).sum(axis=-1))


def _nll(xp: ModuleType, logits: Any, labels: Any) -> Any:
    top = logits.max(axis=-1)
    normaliser = top + xp.log(xp.exp(logits - top[:, None]).sum(axis=-1))
    return normaliser - xp.take_along_axis(logits, labels, axis=-1)[:, 0]
