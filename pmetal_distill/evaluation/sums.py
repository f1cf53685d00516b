"""Sums of token scores by group, and the positions that group them. 8 numbers a group."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pmetal_distill.evaluation.scores import TokenScores

_TOP = 5
_FIRST_EDGE, _STEP = 16, 4
Int = npt.NDArray[np.integer[Any]]


@dataclass(slots=True, eq=False)
class ScoreSums:
    """Sums over tokens by group.

    Args:
        temperatures: of the scores.
    """

    temperatures: Sequence[float]
    _sums: npt.NDArray[np.float64] = field(init=False)
    _knows_teacher: bool = True

    def __post_init__(self) -> None:
        self._sums = np.zeros((0, len(self.temperatures) + 6))

    def add(self, scores: TokenScores, groups: Int) -> None:
        """Adds tokens; `groups` [n] numbers the group of each, from 0."""
        if not len(scores):
            return
        self._knows_teacher = scores.teacher_nll is not None
        columns = np.stack(
            [
                *scores.kl,
                np.ones(len(scores)),
                scores.labelled,
                scores.student_nll,
                np.zeros(len(scores)) if scores.teacher_nll is None else scores.teacher_nll,
                scores.teacher_rank < 1,
                scores.teacher_rank < _TOP,
            ],
            axis=1,
            dtype=np.float64,
        )
        missing = int(groups.max()) + 1 - len(self._sums)
        if missing > 0:
            self._sums = np.concatenate([self._sums, np.zeros((missing, columns.shape[1]))])
        np.add.at(self._sums, groups, columns)

    def tokens(self, group: int) -> int:
        """Tokens in a group."""
        return int(self._sums[group, len(self.temperatures)]) if group < len(self._sums) else 0

    def groups(self) -> list[int]:
        """Groups that have tokens."""
        return [group for group in range(len(self._sums)) if self.tokens(group)]

    def summary(self, group: int) -> dict[str, float]:
        """Means over the tokens of a group: `kl@T`, `top1`, `top5`, perplexities, `tokens`."""
        if not self.tokens(group):
            return {"tokens": 0}
        *kl, tokens, labelled, student_nll, teacher_nll, top1, top5 = self._sums[group].tolist()
        found = {f"kl@{t:g}": total / tokens for t, total in zip(self.temperatures, kl, strict=True)}
        found |= {"top1": top1 / tokens, "top5": top5 / tokens}
        if labelled:
            found["perplexity"] = float(np.exp(student_nll / labelled))
            if self._knows_teacher:
                found["teacher_perplexity"] = float(np.exp(teacher_nll / labelled))
        return {**found, "tokens": int(tokens)}


def document_positions(documents: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Tokens of the same document before each token: all that a model sees besides it.

    Args:
        documents: [B, L], a number for each token; a document stands in one run.

    Returns:
        int32 [B, L].
    """
    index = np.broadcast_to(np.arange(documents.shape[1], dtype=np.int32), documents.shape)
    starts = np.zeros_like(index)
    starts[:, 1:] = np.where(documents[:, 1:] != documents[:, :-1], index[:, 1:], 0)
    return index - np.maximum.accumulate(starts, axis=1)


def position_groups(positions: Int) -> Int:
    """0 for positions 0-15, 1 for 16-63, 2 for 64-255, and so on by factors of 4."""
    edges = _FIRST_EDGE * _STEP ** np.arange(16, dtype=np.int64)
    return np.searchsorted(edges, positions, side="right")


def position_name(group: int) -> str:
    """`16-63` for group 1."""
    first = _FIRST_EDGE * _STEP ** (group - 1) if group else 0
    return f"{first}-{_FIRST_EDGE * _STEP**group - 1}"
