"""The five row functions of the losses (`losses.chunk.RowOps`) on kernels.

This module has the interface of `losses.rows` and gives the same numbers within rounding. Gradient rows come
in the logits' own type. Arrays that no kernel takes, and divergences that none knows, go to `losses.rows`.
"""

from dataclasses import dataclass

import mlx.core as mx

from pmetal_distill.kernels import pair, row
from pmetal_distill.losses import rows as plain
from pmetal_distill.losses.divergences import Divergence, Events, KernelForm, Terms
from pmetal_distill.losses.rows import DenseStatistics, SparseStatistics
from pmetal_distill.reductions import row_logsumexp, row_sum
from pmetal_distill.target import SoftTarget


@dataclass(frozen=True, slots=True, eq=False)
class TeacherRows:
    """A complete target of a few tokens, as the kernels read it.

    Attributes:
        logits: [n, V], unnormalised; entries at the head's ids are meaningless.
        ids: int32 [n, k]; k = 0 for a dense teacher.
        head: float32 [n, k], log-probabilities at T.
        tail: float32 [n], log of the mass outside the head at T; 0 for a dense teacher.
        target: the same, for plain operations.
        ceiling: [n], logits outside the head are at most this; None for no ceiling.
    """

    logits: mx.array
    ids: mx.array
    head: mx.array
    tail: mx.array
    target: SoftTarget
    ceiling: mx.array | None = None


def sparse_statistics(
    logits: mx.array, ids: mx.array, labels: mx.array, inv_temperature: mx.array
) -> SparseStatistics:
    """See `losses.rows.sparse_statistics`."""
    if not row.usable(logits, ids.shape[-1]):
        return plain.sparse_statistics(logits, ids, labels, inv_temperature)
    sums = row.tail_sums(logits, ids, labels, inv_temperature)
    top, head, lse = _whole_row(sums)
    return SparseStatistics(top, lse, sums.label - top, head, sums.top - top, sums.soft)


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
    """See `losses.rows.sparse_gradient`; in the logits' type."""
    s = statistics
    if not row.usable(logits, ids.shape[-1]):
        weights = {"hard": hard, "head": head, "tail": tail}
        return plain.sparse_gradient(logits, ids, labels, inv_temperature, s, **weights)
    by_hard = hard * mx.exp(s.tail_top - s.lse)
    by_soft = tail * mx.exp(-s.tail_lse)
    return row.tail_slope(
        logits,
        ids,
        labels,
        inv_temperature,
        weights=(by_hard, by_soft, s.top + s.tail_top),
        head=head + hard[:, None] * mx.exp(s.head - s.lse[:, None]),
        label=-hard,
    )


def teacher_rows(target: SoftTarget) -> TeacherRows:
    """The second row operand: raw teacher logits; `dense_statistics` finds what normalises them."""
    if target.kind == "dense":
        logits = target.logits() if target.source is None or target.head is not None else target.source
        n = logits.shape[0]
        return TeacherRows(logits, mx.zeros((n, 0), mx.int32), mx.zeros((n, 0)), mx.zeros((n,)), target)
    assert target.head_ids is not None
    assert target.head_logprobs is not None
    assert target.tail_logprobs is not None
    return TeacherRows(
        target.uncut_tail_logits(),
        target.head_ids,
        target.head_logprobs,
        target.tail_logprobs,
        target,
        target.tail_ceiling,
    )


def dense_statistics(
    logits: mx.array,
    teacher: TeacherRows,
    labels: mx.array,
    inv_temperature: mx.array,
    divergence: Divergence,
) -> DenseStatistics:
    """See `losses.rows.dense_statistics`."""
    form = divergence.kernel_form
    if form is None or not _usable(logits, teacher):
        plain_teacher = plain.teacher_rows(teacher.target)
        return plain.dense_statistics(logits, plain_teacher, labels, inv_temperature, divergence)
    b, t = inv_temperature, teacher
    reverse = divergence.name == "reverse_kl"
    sums, other = pair.pair_sums(logits, t.logits, t.ids, labels, b, reverse=reverse, ceiling=t.ceiling)
    top, head, lse = _whole_row(sums)
    soft_lse = mx.logaddexp(sums.soft + (sums.top - top) * b, _logsumexp(head * b))
    norms = pair.PairNorms(top, -soft_lse, other.top, t.tail - other.soft)
    if form.name == "means":
        value, slope = _by_means(sums, other, t, norms, b, divergence.name)
    else:
        value, slope = pair.pair_divergence(
            logits, t.logits, t.ids, b, norms, weights=form.weights, ceiling=t.ceiling
        )
        value = value + _balance(sums, t, norms, b, form)
    terms = _head_terms(head, soft_lse, t, b, divergence)
    return DenseStatistics(
        top,
        lse,
        sums.label - top,
        soft_lse,
        value + row_sum(terms.value),
        slope + row_sum(terms.slope),
        norms.teacher_offset,
        norms.teacher_top,
    )


def dense_gradient(
    logits: mx.array,
    teacher: TeacherRows,
    labels: mx.array,
    inv_temperature: mx.array,
    statistics: DenseStatistics,
    divergence: Divergence,
    *,
    hard: mx.array,
    soft: mx.array,
) -> mx.array:
    """See `losses.rows.dense_gradient`; in the logits' type."""
    s, t, b = statistics, teacher, inv_temperature
    form = divergence.kernel_form
    if form is None or not _usable(logits, teacher):
        plain_teacher = plain.teacher_rows(teacher.target)
        return plain.dense_gradient(logits, plain_teacher, labels, b, s, divergence, hard=hard, soft=soft)
    norms = pair.PairNorms(s.top, -s.soft_lse, s.teacher_top, s.teacher_offset)
    soft = soft * b
    head = mx.take_along_axis(logits, t.ids, axis=-1).astype(mx.float32) - s.top[:, None]
    terms = _head_terms(head, s.soft_lse, t, b, divergence)
    q_head = mx.exp(head * b - s.soft_lse[:, None])
    at_head = soft[:, None] * (terms.slope - q_head * s.slope[:, None])
    return pair.pair_slope(
        logits,
        t.logits,
        t.ids,
        labels,
        b,
        norms,
        _pair_weights(s, norms, b, divergence, soft)._replace(hard=hard * mx.exp(-s.lse)),
        divergence=form.weights,
        head=at_head + hard[:, None] * mx.exp(head - s.lse[:, None]),
        label=-hard,
        ceiling=t.ceiling,
    )


def _usable(logits: mx.array, t: TeacherRows) -> bool:
    return row.usable(logits, t.ids.shape[-1]) and row.usable(t.logits, t.ids.shape[-1])


def _whole_row(sums: row.TailSums) -> tuple[mx.array, mx.array, mx.array]:
    """The row's largest logit, the head relative to it, and the row's log sum relative to it."""
    if not sums.head.shape[-1]:
        return sums.top, sums.head, sums.hard
    top = mx.maximum(sums.top, sums.head.max(axis=-1))
    head = sums.head - top[:, None]
    return top, head, mx.logaddexp(sums.hard + sums.top - top, row_logsumexp(head))


def _logsumexp(scores: mx.array) -> mx.array:
    return row_logsumexp(scores) if scores.shape[-1] else mx.full(scores.shape[:1], -1.0e30)


def _head_terms(
    head: mx.array, soft_lse: mx.array, t: TeacherRows, b: mx.array, divergence: Divergence
) -> Terms:
    lq = head * b - soft_lse[:, None]
    return divergence.terms(mx, Events(t.head, mx.exp(t.head), lq, mx.exp(lq)))


def _by_means(
    sums: row.TailSums,
    other: pair.TeacherSums,
    t: TeacherRows,
    norms: pair.PairNorms,
    b: mx.array,
    name: str,
) -> tuple[mx.array, mx.array]:
    """Value and slope outside the head of the divergences that are made of means, [n] each."""
    below = (sums.top - norms.student_top) * b + norms.student_offset  # ln q of the tail's largest
    p, q = mx.exp(t.tail), mx.exp(below + sums.soft)
    if name == "soft_cross_entropy":
        return -p * ((other.mean - other.forward_gap) * b + below), -p
    if name == "forward_kl":
        gap = other.forward_gap * b + norms.teacher_offset - below
        return p * gap + (q - p), -p
    if name != "reverse_kl":
        raise AssertionError(f"the kernels have no means for {name}")
    value = q * (other.reverse_gap * b + below - norms.teacher_offset)
    return value + (p - q), value + q


def _balance(
    sums: row.TailSums, t: TeacherRows, norms: pair.PairNorms, b: mx.array, form: KernelForm
) -> mx.array:
    """What the skewed divergences add to each token so that all additions cancel: its sum over the tail."""
    p = mx.exp(t.tail)
    q = mx.exp((sums.top - norms.student_top) * b + norms.student_offset + sums.soft)
    return form.balance * (q - p)


def _pair_weights(
    s: DenseStatistics,
    norms: pair.PairNorms,
    b: mx.array,
    divergence: Divergence,
    soft: mx.array,
) -> pair.PairWeights:
    q = mx.exp(norms.student_offset)
    through = -soft * s.slope * q
    if divergence.name in ("forward_kl", "soft_cross_entropy"):
        return pair.PairWeights(soft, through, teacher=-soft * mx.exp(norms.teacher_offset))
    if divergence.name == "reverse_kl":
        constant = norms.student_offset - norms.teacher_offset + 1.0
        return pair.PairWeights(soft, through + soft * q * constant, gap=soft * q * b)
    return pair.PairWeights(soft, through, term=soft)
