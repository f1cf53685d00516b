"""`pair_stats` and `pair_divergence` in plain MLX operations, with MLX's own autodiff for the gradients."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from pmetal_distill.kernels import plain


def stats_op(power: int, hard: bool, reverse: bool) -> Callable[..., Any]:
    """Same results and order as the kernels' operation; `power` does not matter here."""

    def op(z: mx.array, t: mx.array, ids: mx.array, labels: mx.array, par: mx.array) -> tuple[mx.array, ...]:
        scores, teacher = plain.without_head(z, ids), mx.stop_gradient(plain.without_head(t, ids))
        lse1, lse = _student(scores, par[0], hard)
        teacher_lse = plain.logsumexp(teacher * par[0])
        p = mx.exp(teacher * par[0] - teacher_lse[:, None])
        q = mx.exp(scores * par[0] - lse[:, None])
        inside = scores > plain.LOWEST
        gap = mx.where(inside, teacher - scores, 0.0)
        forward = mx.where(inside, p * gap, 0.0).sum(axis=-1)
        backward = -mx.where(inside, q * gap, 0.0).sum(axis=-1) if reverse else mx.zeros((len(ids),))
        mean = mx.where(inside, p * teacher, 0.0).sum(axis=-1)
        head, label = plain.gather(z, ids, labels)
        return lse1, lse, head, label, forward, backward, teacher_lse, mean, par

    return op


def divergence_op(power: int, hard: bool, mixture: bool) -> Callable[..., Any]:
    """Same results and order as the kernels' operation."""

    def op(
        z: mx.array, t: mx.array, ids: mx.array, labels: mx.array, log_tail: mx.array, par: mx.array
    ) -> tuple[mx.array, ...]:
        scores, teacher = plain.without_head(z, ids), mx.stop_gradient(plain.without_head(t, ids))
        lse1, lse = _student(scores, par[0], hard)
        head, label = plain.gather(z, ids, labels)
        total = mx.logaddexp(lse, mx.logsumexp(head * par[0], axis=-1)) if ids.shape[-1] else lse
        lq = scores * par[0] - total[:, None]
        offset = log_tail - plain.logsumexp(teacher * par[0])
        lp = mx.stop_gradient(teacher * par[0] + offset[:, None])
        terms = _mixture(lp, lq, par) if mixture else 0.5 * mx.abs(mx.exp(lp) - mx.exp(lq))
        value = mx.where(scores > plain.LOWEST, terms, 0.0).sum(axis=-1)
        return lse1, lse, head, label, value

    return op


def _student(scores: mx.array, inverse: mx.array, hard: bool) -> tuple[mx.array, mx.array]:
    lse1 = plain.logsumexp(scores) if hard else mx.zeros((len(scores),))
    return lse1, plain.logsumexp(scores * inverse)


def _mixture(lp: mx.array, lq: mx.array, par: mx.array) -> mx.array:
    wp, wq, share = par[1], par[2], par[3]
    lm = mx.logaddexp(lp + mx.log(share), lq + mx.log(1.0 - share))
    return wp * mx.exp(lp) * (lp - lm) + wq * mx.exp(lq) * (lq - lm)
