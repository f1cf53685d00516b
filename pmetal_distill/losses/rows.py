"""Row statistics and row gradients of student logits in plain MLX ops; the place where kernels plug in.

Two pairs of functions are all that touches a row of the vocabulary. The sparse pair serves targets over k
head tokens and a tail (statistics: 1 read of the logits; gradient: 1 read, 1 write); the dense pair takes a
second row, the teacher's log-probabilities. Everything else of a loss is arithmetic on [n, k] arrays.

All logits are taken relative to the row's largest, so that logits of any size lose no digits in differences.
"""

from typing import NamedTuple

import mlx.core as mx

from pmetal_distill.losses.divergences import Divergence, Events
from pmetal_distill.reductions import NEGATIVE, row_logsumexp, row_sum
from pmetal_distill.target import SoftTarget


class SparseStatistics(NamedTuple):
    """Per row of student logits s, float32.

    Attributes:
        top: [n], largest s.
        lse: [n], log sum exp(s - top).
        label: [n], s[label] - top.
        head: [n, k], s[ids] - top.
        tail_top: [n], largest s - top outside the head; `NEGATIVE` where nothing is.
        tail_lse: [n], log sum outside the head of exp((s - top - tail_top) / T).
    """

    top: mx.array
    lse: mx.array
    label: mx.array
    head: mx.array
    tail_top: mx.array
    tail_lse: mx.array


class DenseStatistics(NamedTuple):
    """Per row of student logits s and teacher log-probabilities, float32.

    Attributes:
        top: [n], largest s.
        lse: [n], log sum exp(s - top).
        label: [n], s[label] - top.
        soft_lse: [n], log sum exp((s - top) / T).
        value: [n], the divergence.
        slope: [n], sum of its derivatives with respect to log q.
        teacher_offset, teacher_top: [n], what kernels turn raw teacher logits t into log-probabilities with:
            (t - teacher_top) / T + teacher_offset; 0 and of no use where the rows are log-probabilities.
    """

    top: mx.array
    lse: mx.array
    label: mx.array
    soft_lse: mx.array
    value: mx.array
    slope: mx.array
    teacher_offset: mx.array
    teacher_top: mx.array


def teacher_rows(target: SoftTarget) -> mx.array:
    """The second row operand of the dense pair, [n, V]."""
    return target.rows()


def sparse_statistics(
    logits: mx.array, ids: mx.array, labels: mx.array, inv_temperature: mx.array
) -> SparseStatistics:
    """Statistics of rows against a head.

    Args:
        logits: student logits [n, V], any float type.
        ids: head [n, k].
        labels: [n], each from 0 to V-1.
        inv_temperature: 1/T, scalar.
    """
    top, shifted = _shift(logits)
    outside = mx.put_along_axis(shifted, ids, mx.array(NEGATIVE), axis=-1)
    tail_top = outside.max(axis=-1)
    return SparseStatistics(
        top,
        row_logsumexp(shifted),
        _take(shifted, labels),
        mx.take_along_axis(shifted, ids, axis=-1),
        tail_top,
        row_logsumexp((outside - tail_top[:, None]) * inv_temperature),
    )


def sparse_gradient(
    logits: mx.array,
    ids: mx.array,
    labels: mx.array,
    inv_temperature: mx.array,
    statistics: SparseStatistics,
    *,
    hard: mx.array,
    head: mx.array,
    tail: mx.array,
) -> mx.array:
    """Gradient rows [n, V], float32: `hard` of the cross-entropy, plus given head and tail parts.

    Args:
        logits, ids, labels, inv_temperature: as for `sparse_statistics`.
        statistics: its result.
        hard: [n], weight of the cross-entropy with the label.
        head: [n, k], added at the head's tokens.
        tail: [n], shared out over the other tokens in proportion to their probability at T.
    """
    s = statistics
    shifted = mx.maximum(logits.astype(mx.float32) - s.top[:, None], NEGATIVE)
    exponent = (shifted - s.tail_top[:, None]) * inv_temperature - s.tail_lse[:, None]
    soft = tail[:, None] * mx.exp(mx.minimum(exponent, 0.0))
    rows = mx.put_along_axis(soft, ids, head, axis=-1)
    return _add_hard(rows, shifted, s.lse, labels, hard)


def dense_statistics(
    logits: mx.array, teacher: mx.array, labels: mx.array, inv_temperature: mx.array, divergence: Divergence
) -> DenseStatistics:
    """Statistics of rows against a teacher that knows every token.

    Args:
        logits: student logits [n, V], any float type.
        teacher: result of `teacher_rows`.
        labels: [n], each from 0 to V-1.
        inv_temperature: 1/T, scalar.
        divergence: which one.
    """
    top, shifted = _shift(logits)
    scaled = shifted * inv_temperature
    soft_lse = row_logsumexp(scaled)
    lq = scaled - soft_lse[:, None]
    terms = divergence.terms(mx, Events(teacher, mx.exp(teacher), lq, mx.exp(lq)))
    return DenseStatistics(
        top,
        row_logsumexp(shifted),
        _take(shifted, labels),
        soft_lse,
        row_sum(terms.value),
        row_sum(terms.slope),
        mx.zeros_like(top),
        mx.zeros_like(top),
    )


def dense_gradient(
    logits: mx.array,
    teacher: mx.array,
    labels: mx.array,
    inv_temperature: mx.array,
    statistics: DenseStatistics,
    divergence: Divergence,
    *,
    hard: mx.array,
    soft: mx.array,
) -> mx.array:
    """Gradient rows [n, V], float32, of `soft` times the divergence plus `hard` times the cross-entropy.

    Args:
        logits, teacher, labels, inv_temperature, divergence: as for `dense_statistics`.
        statistics: its result.
        hard, soft: weights, [n].
    """
    s = statistics
    shifted = mx.maximum(logits.astype(mx.float32) - s.top[:, None], NEGATIVE)
    lq = shifted * inv_temperature - s.soft_lse[:, None]
    q = mx.exp(lq)
    slope = divergence.terms(mx, Events(teacher, mx.exp(teacher), lq, q)).slope
    rows = (soft * inv_temperature)[:, None] * (slope - q * s.slope[:, None])
    return _add_hard(rows, shifted, s.lse, labels, hard)


def _shift(logits: mx.array) -> tuple[mx.array, mx.array]:
    scores = logits.astype(mx.float32)
    top = scores.max(axis=-1)
    return top, mx.maximum(scores - top[:, None], NEGATIVE)


def _take(rows: mx.array, labels: mx.array) -> mx.array:
    return mx.take_along_axis(rows, labels[:, None], axis=-1)[:, 0]


def _add_hard(rows: mx.array, shifted: mx.array, lse: mx.array, labels: mx.array, hard: mx.array) -> mx.array:
    rows = rows + hard[:, None] * mx.exp(shifted - lse[:, None])
    at_label = (_take(rows, labels) - hard)[:, None]
    return mx.put_along_axis(rows, labels[:, None], at_label, axis=-1)
