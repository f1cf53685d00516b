"""How close a student is to its teacher on given text: divergence, agreement, perplexity, calibration.

Costs one forward pass of each model and, per token, one read of both rows of logits per temperature. Rows are
made in chunks, so [tokens, vocabulary] never exists at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.evaluation.reliability import Reliability
from pmetal_distill.evaluation.scores import TokenScores, score_logits
from pmetal_distill.evaluation.sums import ScoreSums, position_groups, position_name

Int = npt.NDArray[np.integer[Any]]


@dataclass(slots=True, eq=False)
class Comparison:
    """Sums over tokens of what two models say about them.

    Args:
        temperatures: softmax temperatures at which KL(teacher || student) is taken, each > 0.
        kinds: names of the kinds of document that tokens can be of; none does not tell them apart.

    Attributes:
        labels: reliability of the student's first choice as a prediction of the next token.
        teacher: reliability as an estimate of the teacher's probability of that choice.
    """

    temperatures: Sequence[float]
    kinds: Sequence[str] = ()
    labels: Reliability = field(default_factory=Reliability)
    teacher: Reliability = field(default_factory=Reliability)
    _total: ScoreSums = field(init=False)
    _by_position: ScoreSums = field(init=False)
    _by_kind: ScoreSums = field(init=False)

    def __post_init__(self) -> None:
        self._total, self._by_position, self._by_kind = (ScoreSums(self.temperatures) for _ in range(3))

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._total.tokens(0)

    def add(
        self,
        teacher_logits: mx.array,
        student_logits: mx.array,
        labels: mx.array,
        *,
        positions: Int | None = None,
        kinds: Int | None = None,
    ) -> None:
        """Adds a chunk.

        Args:
            teacher_logits: [tokens, vocab], any float type.
            student_logits: [tokens, vocab]; of vocabularies padded differently the columns that both have.
            labels: [tokens], the next token or -100 where there is none.
            positions: [tokens], see `document_positions`.
            kinds: [tokens], numbers in `self.kinds`.
        """
        scores = score_logits(teacher_logits, student_logits, labels, self.temperatures)
        self.add_scores(scores, positions=positions, kinds=kinds)

    def add_scores(
        self, scores: TokenScores, *, positions: Int | None = None, kinds: Int | None = None
    ) -> None:
        """Adds tokens whose scores are known; arguments as for `add`."""
        self._total.add(scores, np.zeros(len(scores), np.int64))
        if positions is not None:
            self._by_position.add(scores, position_groups(positions))
        if kinds is not None:
            self._by_kind.add(scores, kinds)
        labelled = scores.labelled
        self.labels.add(scores.confidence[labelled], scores.right[labelled].astype(np.float64))
        if scores.teacher_probability is not None:
            self.teacher.add(scores.confidence, scores.teacher_probability)

    def summary(self) -> dict[str, float]:
        """Means over tokens.

        Returns:
            `kl@T` in nats; agreement `top1` and `top5` (the teacher's first choice is the student's, or among
            its first five); perplexities; calibration errors `ece` against the text and `ece_teacher` against
            the teacher's probabilities; `tokens`.
        """
        found = self._total.summary(0)
        tokens = found.pop("tokens")
        errors = {"ece": self.labels, "ece_teacher": self.teacher}
        found |= {name: bins.error for name, bins in errors.items() if bins.sums[0].any()}
        return {**found, "tokens": tokens}

    def report(self) -> dict[str, Any]:
        """`summary()` and what is behind it.

        Returns:
            beside the summary, lists of rows: `by_position` and `by_kind` (the name of the group and its
            means), `reliability` and `reliability_teacher` (`Reliability.bins`). Empty ones are left out.
        """
        positions, kinds = self._by_position, self._by_kind
        found = {
            "by_position": [
                {"position": position_name(group), **positions.summary(group)} for group in positions.groups()
            ],
            "by_kind": [{"kind": self.kinds[group], **kinds.summary(group)} for group in kinds.groups()],
            "reliability": self.labels.bins(),
            "reliability_teacher": self.teacher.bins(),
        }
        return {**self.summary(), **{name: rows for name, rows in found.items() if rows}}


def compare_hidden(
    comparison: Comparison,
    *,
    teacher_head: Callable[[mx.array], mx.array],
    teacher_hidden: mx.array,
    student_head: Callable[[mx.array], mx.array],
    student_hidden: mx.array,
    labels: mx.array,
    positions: Int | None = None,
    kinds: Int | None = None,
    chunk_size: int = 256,
) -> None:
    """Adds rows given as final hidden states; logits are made `chunk_size` rows at a time.

    Args:
        comparison: where the sums go.
        teacher_head, student_head: hidden [tokens, d] -> logits [tokens, vocab].
        teacher_hidden, student_hidden: [tokens, d], after the final norm; the widths may differ.
        labels: [tokens], -100 where there is no next token.
        positions, kinds: [tokens], as for `Comparison.add`.
        chunk_size: rows of logits alive at once.
    """
    for start in range(0, teacher_hidden.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        comparison.add(
            teacher_head(teacher_hidden[rows]),
            student_head(student_hidden[rows]),
            labels[rows],
            positions=None if positions is None else positions[rows],
            kinds=None if kinds is None else kinds[rows],
        )
