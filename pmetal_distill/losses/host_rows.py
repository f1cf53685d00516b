"""The work on a few rows of logits in NumPy, in place, for the host back end. About 4 ns a logit and thread.

The blocks are small enough to stay in the processor's cache through all passes. Formulas as in `rows` and
`chunk`; forward KL and soft cross-entropy, whose gradient is q - p, take a path without their elementwise
terms.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmetal_distill.losses.divergences import Divergence, Events
from pmetal_distill.reductions import NEGATIVE

Array = npt.NDArray[np.float32]

_DOT_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class RowData:
    """What is known about each row; arrays share their first axis.

    Attributes:
        labels: int [n], 0 where there is none.
        soft, hard: float32 [n], weights of divergence and cross-entropy in the gradient.
        head_ids: int [n, k]; k = 0 for a dense teacher.
        head: float32 [n, k], teacher log-probabilities of the head.
        tail: float32 [n], of everything outside the head.
    """

    labels: npt.NDArray[np.integer[Any]]
    soft: Array
    hard: Array
    head_ids: npt.NDArray[np.integer[Any]]
    head: Array
    tail: Array

    def rows(self, index: slice | npt.NDArray[np.integer[Any]]) -> "RowData":
        """The same for some rows."""
        return RowData(*(getattr(self, f.name)[index] for f in fields(self)))


class Work(NamedTuple):
    """Fixed settings of a pass, and scratch rows of one thread.

    Attributes:
        b: inverse temperature.
        divergence: which one.
        gradient: whether logits are to be replaced by gradient rows.
        bias, scale, softcap: of the head.
        buffers: [3, block, V].
    """

    b: np.float32
    divergence: Divergence
    gradient: bool
    bias: Array | None
    scale: float | None
    softcap: float | None
    buffers: Array


class Losses(NamedTuple):
    """Per row: divergence, cross-entropy with the label, largest student probability at T=1."""

    soft: Array
    hard: Array
    confidence: Array


def to_logits(rows: Array, work: Work) -> None:
    """Turns products `hidden @ weight.T` [n, V] into logits, in place."""
    if work.bias is not None:
        rows += work.bias
    if work.scale is not None:
        rows *= np.float32(work.scale)
    if work.softcap is not None:
        rows /= np.float32(work.softcap)
        np.tanh(rows, out=rows)
        rows *= np.float32(work.softcap)


def process(logits: Array, teacher: Array | None, data: RowData, work: Work) -> Losses:
    """Losses of a block of rows; with `work.gradient`, `logits` become gradient rows of the head's products.

    Args:
        logits: float32 [n, V], overwritten.
        teacher: float32 [n, V], teacher logits (a sketch's entries in the head are ignored), overwritten;
            None for a target over head and tail.
        data: of these rows.
        work: settings and scratch.
    """
    work = work._replace(buffers=work.buffers[:, : len(logits)])
    slope = _head_slope(logits, work)
    logits -= logits.max(axis=1, keepdims=True)
    np.maximum(logits, NEGATIVE, out=logits)
    if teacher is None:
        losses = _sparse(logits, data, work)
    elif work.divergence.slope_is_minus_p:
        losses = _dense_minus_p(logits, teacher, data, work)
    else:
        losses = _dense(logits, teacher, data, work)
    if slope is not None:
        logits *= slope
    return losses


def ranks(logits: Array, teacher: Array | None, data: RowData) -> tuple[Array, Array]:
    """How many tokens the student puts above the teacher's first one, and above the label, per row.

    Args: as for `process`, before it.
    """
    if data.head_ids.shape[1]:
        best = data.head_ids[:, :1]
    else:
        assert teacher is not None
        best = teacher.argmax(axis=1)[:, None]
    above = [(logits > _take(logits, c)).sum(axis=1) for c in (best, data.labels[:, None])]
    return above[0].astype(np.float32), above[1].astype(np.float32)


def _losses(soft: Array, normaliser: Array, label: Array) -> Losses:
    return Losses(soft, (np.log(normaliser) - label)[:, 0], 1.0 / normaliser[:, 0])


def _head_slope(logits: Array, work: Work) -> Array | np.float32 | None:
    """Derivative of the logits by the head's products; None for 1."""
    if not work.gradient or work.softcap is work.scale is None:
        return None
    scale = np.float32(1.0 if work.scale is None else work.scale)
    if work.softcap is None:
        return scale
    return np.asarray(scale * (1.0 - np.square(logits / np.float32(work.softcap))))


def _sparse(z: Array, data: RowData, work: Work) -> Losses:
    """Head and tail: the tail's share of the gradient follows the student's own tail."""
    b, shares = work.b, work.buffers[0]
    head, label = _take(z, data.head_ids), _take(z, data.labels[:, None])
    np.copyto(shares, z)
    np.put_along_axis(shares, data.head_ids, NEGATIVE, axis=1)
    top = shares.max(axis=1, keepdims=True)
    shares -= top
    shares *= b
    np.exp(shares, out=shares)
    total = shares.sum(axis=1, keepdims=True)
    scores = np.concatenate([head * b, top * b + np.log(total)], axis=1)
    lq = scores - _logsumexp(scores)
    lp = np.concatenate([data.head, data.tail[:, None]], axis=1)
    q = np.exp(lq)
    terms = work.divergence.terms(np, Events(lp, np.exp(lp), lq, q))
    np.exp(z, out=z)
    normaliser = z.sum(axis=1, keepdims=True)
    losses = _losses(terms.value.sum(axis=1), normaliser, label)
    if work.gradient:
        events = (data.soft * b)[:, None] * (terms.slope - q * terms.slope.sum(axis=1, keepdims=True))
        z *= data.hard[:, None] / normaliser
        at_head = _take(z, data.head_ids) + events[:, :-1]
        shares *= events[:, -1:] / total
        z += shares
        np.put_along_axis(z, data.head_ids, at_head, axis=1)
        _subtract_at(z, data.labels[:, None], data.hard[:, None])
    return losses


def _dense_minus_p(z: Array, t: Array, data: RowData, work: Work) -> Losses:
    """Forward KL or soft cross-entropy with a teacher that knows every token."""
    b, (p, q, _) = work.b, work.buffers
    offset = _shift_teacher(t, p, data, b)
    scale = np.exp(offset)
    zh, label = _take(z, data.head_ids), _take(z, data.labels[:, None])
    np.multiply(z, b, out=q)
    np.exp(q, out=q)
    total = q.sum(axis=1, keepdims=True)
    lse = np.log(total)
    ph = np.exp(data.head)
    soft = (ph * (lse - b * zh)).sum(axis=1, keepdims=True) + np.exp(data.tail)[:, None] * lse
    soft -= b * _dot(p, z) * scale
    if work.divergence.name == "forward_kl":
        soft += _dot(p, t) * scale + np.exp(data.tail)[:, None] * offset
        soft += (ph * data.head).sum(axis=1, keepdims=True)
    normaliser = _exponentiate(z, q, work.b)
    losses = _losses(soft[:, 0], normaliser, label)
    if work.gradient:
        weight = (data.soft * b)[:, None]
        z *= data.hard[:, None] / normaliser
        q *= weight / total
        z += q
        p *= weight * scale
        z -= p
        _subtract_at(z, data.head_ids, weight * ph)
        _subtract_at(z, data.labels[:, None], data.hard[:, None])
    return losses


def _dense(z: Array, t: Array, data: RowData, work: Work) -> Losses:
    """Any divergence with a teacher that knows every token."""
    b, (p, q, lq) = work.b, work.buffers
    offset = _shift_teacher(t, p, data, b)
    t += offset
    p *= np.exp(offset)
    np.put_along_axis(t, data.head_ids, data.head, axis=1)
    np.put_along_axis(p, data.head_ids, np.exp(data.head), axis=1)
    label = _take(z, data.labels[:, None])
    np.multiply(z, b, out=lq)
    np.exp(lq, out=q)
    total = q.sum(axis=1, keepdims=True)
    lq -= np.log(total)
    q /= total
    terms = work.divergence.terms(np, Events(t, p, lq, q))
    np.exp(z, out=z)
    normaliser = z.sum(axis=1, keepdims=True)
    losses = _losses(terms.value.sum(axis=1), normaliser, label)
    if work.gradient:
        z *= data.hard[:, None] / normaliser
        q *= terms.slope.sum(axis=1, keepdims=True)
        np.subtract(terms.slope, q, out=q)
        q *= (data.soft * b)[:, None]
        z += q
        _subtract_at(z, data.labels[:, None], data.hard[:, None])
    return losses


def _shift_teacher(t: Array, p: Array, data: RowData, b: np.float32) -> Array:
    """Shifts and tempers `t`; `p` becomes its exponential, 0 in the head. log p is `t` plus the result."""
    if data.head_ids.shape[1]:
        np.put_along_axis(t, data.head_ids, NEGATIVE, axis=1)
    t -= t.max(axis=1, keepdims=True)
    np.maximum(t, NEGATIVE, out=t)
    if b != 1.0:
        t *= b
    np.exp(t, out=p)
    return np.asarray(data.tail[:, None] - np.log(p.sum(axis=1, keepdims=True)))


def _exponentiate(z: Array, q: Array, b: np.float32) -> Array:
    """Replaces z by exp(z), from q = exp(b z) where that is cheaper; returns the sum."""
    if b == 1.0:
        np.copyto(z, q)
    elif b == 0.5:
        np.multiply(q, q, out=z)
    else:
        np.exp(z, out=z)
    return np.asarray(z.sum(axis=1, keepdims=True))


def _dot(a: Array, b: Array) -> Array:
    """Row-wise dot products [n, 1], in blocks, which keeps float32's digits."""
    n, vocab = a.shape
    whole = vocab - vocab % _DOT_BLOCK
    total = np.vecdot(a[:, whole:], b[:, whole:])
    if whole:
        shape = (n, -1, _DOT_BLOCK)
        total = total + np.vecdot(a[:, :whole].reshape(shape), b[:, :whole].reshape(shape)).sum(axis=1)
    return np.asarray(total[:, None])


def _logsumexp(scores: Array) -> Array:
    top = scores.max(axis=1, keepdims=True)
    return np.asarray(top + np.log(np.exp(scores - top).sum(axis=1, keepdims=True)))


def _take(rows: Array, columns: npt.NDArray[np.integer[Any]]) -> Array:
    return np.take_along_axis(rows, columns, axis=1)


def _subtract_at(rows: Array, columns: npt.NDArray[np.integer[Any]], values: Array) -> None:
    if columns.shape[1]:
        np.put_along_axis(rows, columns, _take(rows, columns) - values, axis=1)
