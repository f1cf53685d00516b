"""The losses in float64 NumPy: dense, obvious and slow. The package is checked against this file.

A target is a row of log-probabilities over events. For a complete target the events are the V tokens; for
"bucket" they are the k head tokens and, as one more event, everything else. Impossible events have -inf.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer]


def logsumexp(x: Array) -> Array:
    """log sum exp over the last axis; -inf where every entry is."""
    top = x.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0]


def log_softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> Array:
    """Log-probabilities at a temperature, [n, V]."""
    x = np.asarray(logits, np.float64) / temperature
    x = x - x.max(axis=-1, keepdims=True)
    return x - logsumexp(x)[..., None]


def top_k(logits: npt.ArrayLike, k: int) -> Ids:
    """Ids of the k largest logits in descending order, ties by lower id, [n, k]."""
    return np.argsort(-np.asarray(logits, np.float64), axis=-1, kind="stable")[:, :k].astype(np.int32)


def in_head(ids: Ids, vocab_size: int) -> npt.NDArray[np.bool_]:
    """True at the head's tokens, [n, V]."""
    mask = np.zeros((len(ids), vocab_size), bool)
    np.put_along_axis(mask, ids.astype(np.int64), True, axis=-1)
    return mask


def tail_values(logits: npt.ArrayLike, ids: Ids, nodes: tuple[float, ...]) -> Array:
    """A(b) = log sum over the tail of exp(b (z_j - z_ref)) at each node, [n, m]."""
    z = np.asarray(logits, np.float64)
    reference = np.take_along_axis(z, ids[:, -1:].astype(np.int64), axis=-1)
    tail = np.where(in_head(ids, z.shape[-1]), -np.inf, z - reference)
    return np.stack([logsumexp(b * tail) for b in nodes], axis=-1)


def curve_at(values: Array, nodes: tuple[float, ...], at_zero: float, b: float) -> Array:
    """The polynomial through (0, at_zero) and the nodes, evaluated at b by Lagrange's formula, [n]."""
    points = np.array([0.0, *nodes])
    heights = np.concatenate([np.full((len(values), 1), at_zero), values], axis=-1)
    weights = [np.prod([(b - q) / (p - q) for q in points if q != p]) for p in points]
    return heights @ np.array(weights)


def bucket_logprobs(head: Array, tail_at_b: Array, temperature: float) -> Array:
    """Head log-probabilities at T=1 [n, k] and A(1/T) [n] -> log-probabilities of the k+1 events at T."""
    scores = np.concatenate([head, head[:, -1:] + temperature * tail_at_b[:, None]], axis=-1)
    return log_softmax(scores, temperature)


def sketch_logprobs(events: Array, ids: Ids, tail_logits: Array, temperature: float) -> Array:
    """The k+1 events and unnormalised tail logits [n, V] -> log-probabilities of every token at T."""
    head = in_head(ids, tail_logits.shape[-1])
    scores = np.where(head, -np.inf, tail_logits / temperature)
    rows = scores - logsumexp(scores)[:, None] + events[:, -1:]
    np.put_along_axis(rows, ids.astype(np.int64), events[:, :-1], axis=-1)
    return rows


def capped_tail(
    mean: Array,
    parts: Array,
    y: Array,
    values: Array,
    *,
    nodes: tuple[float, ...],
    at_zero: float,
    margin: float,
) -> Array:
    """Tail logits [n, V] of a sketch, cut `margin` below where its smallest head logit must be."""
    powers = np.vander(np.array([0.0, *nodes]))
    heights = np.concatenate([np.full((len(values), 1), at_zero), values], axis=-1)
    slope = np.linalg.solve(powers, heights.T)[-2]
    logits = mean + y @ parts.T
    return np.minimum(logits, (logits.mean(axis=-1) - slope - margin)[:, None])


def to_events(logq: Array, ids: Ids) -> Array:
    """Log-probabilities of every token [n, V] -> of the head's tokens and of the rest together, [n, k+1]."""
    rest = np.where(in_head(ids, logq.shape[-1]), -np.inf, logq)
    return np.concatenate(
        [np.take_along_axis(logq, ids.astype(np.int64), axis=-1), logsumexp(rest)[:, None]], axis=-1
    )


def _times(weight: Array, value: Array) -> Array:
    return np.where(weight > 0, weight * np.where(weight > 0, value, 0.0), 0.0)


def _difference(a: Array, b: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(a) & np.isneginf(b), 0.0, a - b)


def forward_kl(lp: Array, lq: Array) -> Array:
    """sum p log(p / q) over the last axis."""
    return _times(np.exp(lp), _difference(lp, lq)).sum(axis=-1)


def reverse_kl(lp: Array, lq: Array) -> Array:
    """sum q log(q / p)."""
    return forward_kl(lq, lp)


def jensen_shannon(lp: Array, lq: Array, beta: float) -> Array:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    m = np.logaddexp(np.log(beta) + lp, np.log(1 - beta) + lq)
    return beta * forward_kl(lp, m) + (1 - beta) * forward_kl(lq, m)


def soft_cross_entropy(lp: Array, lq: Array) -> Array:
    """-sum p log q."""
    return -_times(np.exp(lp), lq).sum(axis=-1)


def total_variation(lp: Array, lq: Array) -> Array:
    """Half the sum of |p - q|."""
    return 0.5 * np.abs(np.exp(lp) - np.exp(lq)).sum(axis=-1)


def skewed_forward_kl(lp: Array, lq: Array, skew: float) -> Array:
    """KL(p || skew p + (1 - skew) q)."""
    return forward_kl(lp, np.logaddexp(np.log(skew) + lp, np.log(1 - skew) + lq))


def skewed_reverse_kl(lp: Array, lq: Array, skew: float) -> Array:
    """KL(q || skew q + (1 - skew) p)."""
    return forward_kl(lq, np.logaddexp(np.log(skew) + lq, np.log(1 - skew) + lp))


LOSSES: dict[str, Callable[[Array, Array, float], Array]] = {
    "forward_kl": lambda lp, lq, _: forward_kl(lp, lq),
    "reverse_kl": lambda lp, lq, _: reverse_kl(lp, lq),
    "jensen_shannon": jensen_shannon,
    "soft_cross_entropy": lambda lp, lq, _: soft_cross_entropy(lp, lq),
    "total_variation": lambda lp, lq, _: total_variation(lp, lq),
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}


def _d_forward_kl(lp: Array, lq: Array) -> Array:
    return -np.exp(lp)


def _d_reverse_kl(lp: Array, lq: Array) -> Array:
    return _times(np.exp(lq), _difference(lq, lp) + 1.0)


def _d_jensen_shannon(lp: Array, lq: Array, beta: float) -> Array:
    m = np.logaddexp(np.log(beta) + lp, np.log(1 - beta) + lq)
    return (1 - beta) * _times(np.exp(lq), _difference(lq, m))


def _d_total_variation(lp: Array, lq: Array) -> Array:
    return 0.5 * np.exp(lq) * np.sign(np.exp(lq) - np.exp(lp))


def _d_skewed_forward_kl(lp: Array, lq: Array, skew: float) -> Array:
    m = np.logaddexp(np.log(skew) + lp, np.log(1 - skew) + lq)
    return -(1 - skew) * np.exp(_difference(lp + lq, np.where(np.isneginf(m), 0.0, m)))


def _d_skewed_reverse_kl(lp: Array, lq: Array, skew: float) -> Array:
    m = np.logaddexp(np.log(skew) + lq, np.log(1 - skew) + lp)
    return _times(np.exp(lq), _difference(lq, m) + 1.0 - skew * np.exp(_difference(lq, m)))


DERIVATIVES: dict[str, Callable[[Array, Array, float], Array]] = {
    "forward_kl": lambda lp, lq, _: _d_forward_kl(lp, lq),
    "reverse_kl": lambda lp, lq, _: _d_reverse_kl(lp, lq),
    "jensen_shannon": _d_jensen_shannon,
    "soft_cross_entropy": lambda lp, lq, _: _d_forward_kl(lp, lq),
    "total_variation": lambda lp, lq, _: _d_total_variation(lp, lq),
    "skewed_forward_kl": _d_skewed_forward_kl,
    "skewed_reverse_kl": _d_skewed_reverse_kl,
}


def loss_and_gradient(
    name: str,
    target: Array,
    logits: npt.ArrayLike,
    temperature: float,
    *,
    ids: Ids | None,
    parameter: float = 0.5,
) -> tuple[Array, Array]:
    """The soft loss per token [n] and its gradient with respect to the student's logits [n, V].

    Args:
        name: key of `LOSSES`.
        target: log-probabilities of the events at this temperature; V of them, or k+1 if `ids` is given.
        logits: the student's, [n, V].
        temperature: of the student.
        ids: the head, for targets over k+1 events.
        parameter: beta or skew.
    """
    logq = log_softmax(logits, temperature)
    events = logq if ids is None else to_events(logq, ids)
    value = LOSSES[name](target, events, parameter)
    slope = DERIVATIVES[name](target, events, parameter)
    q = np.exp(logq)
    if ids is None:
        through = slope
    else:
        rest = np.where(in_head(ids, q.shape[-1]), -np.inf, logq)
        share = np.exp(_difference(rest, np.broadcast_to(events[:, -1:], rest.shape)))
        through = np.where(in_head(ids, q.shape[-1]), 0.0, share * slope[:, -1:])
        np.put_along_axis(through, ids.astype(np.int64), slope[:, :-1], axis=-1)
    return value, (through - q * slope.sum(axis=-1, keepdims=True)) / temperature


def hard_loss_and_gradient(
    logits: npt.ArrayLike, labels: Ids, ignore_index: int = -100
) -> tuple[Array, Array]:
    """Cross-entropy at T=1 per token [n], 0 where ignored, and its gradient [n, V]."""
    logq = log_softmax(logits)
    valid = labels != ignore_index
    rows, columns = np.arange(len(labels)), np.where(valid, labels, 0)
    one_hot = np.zeros_like(logq)
    one_hot[rows, columns] = 1.0
    return np.where(valid, -logq[rows, columns], 0.0), (np.exp(logq) - one_hot) * valid[:, None]
