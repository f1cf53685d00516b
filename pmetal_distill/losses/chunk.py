"""The losses of a few tokens and their gradient with respect to the logits, for every target and divergence.

Arithmetic on [n, k+1] arrays around the row functions of `rows`. Kernels that offer the same five functions
(`RowOps`) serve every loss.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx

from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses import rows as plain_rows
from pmetal_distill.losses.divergences import Divergence, Events, Terms
from pmetal_distill.losses.rows import DenseStatistics, SparseStatistics
from pmetal_distill.reductions import row_logsumexp, row_sum
from pmetal_distill.target import SoftTarget

Statistics = SparseStatistics | DenseStatistics


class RowOps(Protocol):
    """The five functions of `rows`; `teacher_rows` may return whatever the dense pair understands."""

    @property
    def teacher_rows(self) -> Any:
        """See `rows.teacher_rows`."""

    @property
    def sparse_statistics(self) -> Any:
        """See `rows.sparse_statistics`."""

    @property
    def sparse_gradient(self) -> Any:
        """See `rows.sparse_gradient`."""

    @property
    def dense_statistics(self) -> Any:
        """See `rows.dense_statistics`."""

    @property
    def dense_gradient(self) -> Any:
        """See `rows.dense_gradient`."""


PLAIN_OPS = cast(RowOps, plain_rows)


def row_ops() -> RowOps:
    """Kernels where the device has them, else plain operations."""
    from pmetal_distill.kernels import dispatch, ops  # imports `rows`

    return PLAIN_OPS if dispatch.platform() is None else cast(RowOps, ops)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Tokens whose losses are wanted.

    Attributes:
        target: the teacher at a temperature.
        labels: int32 [n], `IGNORE_INDEX` where there is none.
        divergence: between teacher and student.
        ops: the row functions.
        teacher: second row operand; None for targets over head and tail.
    """

    target: SoftTarget
    labels: mx.array
    divergence: Divergence
    ops: RowOps
    teacher: Any = None

    @staticmethod
    def of(
        target: SoftTarget, labels: mx.array, divergence: Divergence, ops: RowOps | None = None
    ) -> "Chunk":
        """The chunk, with the teacher's rows made; the device's row functions if `ops` is None."""
        ops = ops or row_ops()
        teacher = ops.teacher_rows(target) if target.complete else None
        return Chunk(target, labels, divergence, ops, teacher)

    def towards(self, logits: mx.array, share: float | mx.array) -> "Chunk":
        """The chunk with a teacher between the student's logits [n, V] (share 0) and its own (share 1)."""
        teacher = self.target.rows() / self.target.inv_temperature
        between = share * teacher + (1 - share) * mx.stop_gradient(logits.astype(mx.float32))
        target = SoftTarget("dense", self.target.vocab_size, self.target.inv_temperature, source=between)
        return Chunk.of(target, self.labels, self.divergence, self.ops)

    def statistics(self, logits: mx.array) -> Statistics:
        """The row statistics of student logits [n, V]."""
        labels, b = self.safe_labels(), self.target.inv_temperature
        if self.target.complete:
            dense = self.ops.dense_statistics(logits, self.teacher, labels, b, self.divergence)
            return cast(DenseStatistics, dense)
        sparse = self.ops.sparse_statistics(logits, self.target.head_ids, labels, b)
        return cast(SparseStatistics, sparse)

    def soft(self, statistics: Statistics) -> mx.array:
        """The divergence per token, nats, [n]."""
        if isinstance(statistics, DenseStatistics):
            return statistics.value
        return row_sum(self._terms(statistics)[0].value)

    def hard(self, statistics: Statistics) -> mx.array:
        """Cross-entropy with the label per token, nats, [n]; 0 where there is none."""
        return mx.where(self.labels == IGNORE_INDEX, 0.0, statistics.lse - statistics.label)

    def gradient(
        self, logits: mx.array, statistics: Statistics, *, soft: mx.array, hard: mx.array
    ) -> mx.array:
        """Gradient of sum(soft * divergence + hard * cross-entropy) by the logits, float32 [n, V].

        Args:
            logits: student logits [n, V].
            statistics: of these logits.
            soft, hard: weights [n].
        """
        labels, b = self.safe_labels(), self.target.inv_temperature
        hard = mx.where(self.labels == IGNORE_INDEX, 0.0, hard)
        if isinstance(statistics, DenseStatistics):
            rows = self.ops.dense_gradient(
                logits, self.teacher, labels, b, statistics, self.divergence, hard=hard, soft=soft
            )
            return cast(mx.array, rows)
        terms, q = self._terms(statistics)
        events = (soft * b)[:, None] * (terms.slope - q * row_sum(terms.slope)[:, None])
        rows = self.ops.sparse_gradient(
            logits,
            self.target.head_ids,
            labels,
            b,
            statistics,
            hard=hard,
            head=events[:, :-1],
            tail=events[:, -1],
        )
        return cast(mx.array, rows)

    def teacher_best(self) -> mx.array:
        """The teacher's most probable token, [n]."""
        if self.target.head_ids is None:
            return self.target.logits().argmax(axis=-1)
        return self.target.head_ids[:, 0]

    def safe_labels(self) -> mx.array:
        """Labels that can be looked up: 0 where there is none."""
        return mx.where(self.labels == IGNORE_INDEX, 0, self.labels)

    def _terms(self, s: SparseStatistics) -> tuple[Terms, mx.array]:
        b = self.target.inv_temperature
        tail = s.tail_top * b + s.tail_lse
        scores = mx.concatenate([s.head * b, tail[:, None]], axis=-1)
        lq = scores - row_logsumexp(scores)[:, None]
        lp, q = self.target.events(), mx.exp(lq)
        return self.divergence.terms(mx, Events(lp, mx.exp(lp), lq, q)), q
