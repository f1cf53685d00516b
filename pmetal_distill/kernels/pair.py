"""Statistics of a student's row beside a teacher's: a dense teacher, or a sketch rebuilt for a chunk of tokens.

`pair_stats` reads both rows once and serves forward KL, reverse KL and soft cross-entropy. `pair_divergence`
needs the normalisers before it can add up a mixture or a total variation and reads both rows twice. Either has
one gradient kernel: two reads and one write.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from pmetal_distill.kernels import dispatch, pair_plain, parameters, tuning
from pmetal_distill.kernels.row import LN2, head_outputs, padded, template, usable

STATS, COEFFICIENTS = 16, 16
FORMS = {"gradient": 0, "reverse": 1, "mixture": 2, "variation": 3}


class PairStats(NamedTuple):
    """What `pair_stats` returns, float32. All sums run over the columns outside the head ("the tail").

    Attributes:
        tail_lse1: [n], ln sum exp(z_j); -1e30 where the tail is empty.
        tail_lse: [n], ln sum exp(z_j / T).
        head: [n, k], z at the head's ids.
        label: [n], z at the label, 0 where the label is negative.
        forward_gap: [n], mean of t_j - z_j under softmax(t / T) of the tail.
        reverse_gap: [n], mean of z_j - t_j under softmax(z / T) of the tail; 0 unless asked for.
        teacher_lse: [n], ln sum exp(t_j / T). Constant, as is the next.
        teacher_mean: [n], mean of t_j under softmax(t / T) of the tail.
    """

    tail_lse1: mx.array
    tail_lse: mx.array
    head: mx.array
    label: mx.array
    forward_gap: mx.array
    reverse_gap: mx.array
    teacher_lse: mx.array
    teacher_mean: mx.array


class PairDivergence(NamedTuple):
    """What `pair_divergence` returns: as in `PairStats`, and the tail's part of the divergence, [n]."""

    tail_lse1: mx.array
    tail_lse: mx.array
    head: mx.array
    label: mx.array
    divergence: mx.array


def pair_stats(
    logits: mx.array,
    teacher: mx.array,
    head_ids: mx.array,
    labels: mx.array,
    *,
    temperature: float | mx.array,
    hard: bool = True,
    reverse: bool = False,
) -> PairStats:
    """One pass over a student's and a teacher's logits.

    Args:
        logits: [n, V], float32, float16 or bfloat16; sums are float32. The results are differentiable in it.
        teacher: [n, V], unnormalised tail logits t; entries at the head's ids are ignored. A constant: its
            gradient is zero.
        head_ids: int32 [n, k], distinct within a row; k = 0 for a dense teacher.
        labels: int32 [n], negative where there is none.
        temperature: > 0; a whole Python number saves an exponential an element.
        hard: False leaves out the sum at T = 1 (`tail_lse1` is then 0).
        reverse: also compute `reverse_gap`.
    """
    op = _ops(logits, teacher, head_ids)[0](tuning.whole_power(temperature), hard, reverse)
    ids, marks = head_ids.astype(mx.int32), labels.astype(mx.int32)
    *results, _ = op(logits, teacher, ids, marks, parameters.pack(temperature))
    return PairStats(*results)


def pair_divergence(
    logits: mx.array,
    teacher: mx.array,
    head_ids: mx.array,
    labels: mx.array,
    log_tail: mx.array,
    *,
    temperature: float | mx.array,
    weights: tuple[float, float, float] | None,
    hard: bool = True,
) -> PairDivergence:
    """The tail's part of a divergence between the teacher's p and the student's q at T, both over all of V.

    Args:
        logits: as in `pair_stats`.
        teacher: as in `pair_stats`.
        head_ids: as in `pair_stats`.
        labels: as in `pair_stats`.
        log_tail: [n], ln of the teacher's tail mass at T; 0 for a dense teacher. A constant.
        temperature: as in `pair_stats`.
        weights: (a, b, s) for the sum of a p ln(p / m) + b q ln(q / m) with m = s p + (1 - s) q, 0 < s < 1;
            None for the sum of |p - q| / 2.
        hard: as in `pair_stats`.
    """
    op = _ops(logits, teacher, head_ids)[1](tuning.whole_power(temperature), hard, weights is not None)
    ids, marks = head_ids.astype(mx.int32), labels.astype(mx.int32)
    par = parameters.pack(temperature, *(weights or (0.0, 0.0, 0.5)))
    return PairDivergence(*op(logits, teacher, ids, marks, log_tail, par)[:5])


def _ops(logits: mx.array, teacher: mx.array, ids: mx.array) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if usable(logits, ids.shape[-1]) and usable(teacher, 0):
        return _stats_op, _divergence_op
    return pair_plain.stats_op, pair_plain.divergence_op


def _zeros(arrays: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
    return tuple(mx.zeros_like(a) for a in arrays)


def _sums(inputs: dict[str, mx.array], power: int, hard: bool, reverse: bool) -> list[mx.array]:
    n, k = inputs["ids"].shape
    constants, threads = template("pair_sums", inputs["z"], k, POWER=power, HARD=hard, REVERSE=reverse)
    outputs: dispatch.Outputs = {"stats": ((n, STATS), mx.float32), **head_outputs(n, k)}
    constants.append(("S", inputs["t"].dtype))
    stats, head, label = dispatch.launch(
        "pair_sums", inputs, outputs, template=constants, groups=n, threads=threads
    )
    return [stats, head[:, :k], label]


def _slope(inputs: dict[str, mx.array], rows: list[mx.array], power: int, hard: bool, form: str) -> mx.array:
    logits, (n, k) = inputs["z"], inputs["ids"].shape
    constants, threads = template("pair_grad", logits, k, POWER=power, HARD=hard, FORM=FORMS[form])
    constants.append(("S", inputs["t"].dtype))
    inputs = {**inputs, "coefficients": padded(rows, COEFFICIENTS)}
    outputs: dispatch.Outputs = {"dz": (logits.shape, logits.dtype)}
    return dispatch.launch("pair_grad", inputs, outputs, template=constants, groups=n, threads=threads)[0]


@cache
def _stats_op(power: int, hard: bool, reverse: bool) -> Callable[..., Any]:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def op(z: mx.array, t: mx.array, ids: mx.array, labels: mx.array, par: mx.array) -> tuple[mx.array, ...]:
        inputs = {"z": z, "t": t, "ids": ids, "labels": labels, "par": par}
        stats, head, label = _sums(inputs, power, hard, reverse)
        s = [stats[:, i] for i in range(6)]
        return s[0], s[1], head, label, s[4], s[5], s[2], s[3], stats

    @op.vjp  # type: ignore[untyped-decorator]
    def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        z, t, ids, labels, par = primals
        d_hard, d_soft, d_head, d_label, d_forward, d_reverse, *_ = cotangents
        stats, inverse = outputs[8], par[0]
        scale = [mx.exp(stats[:, i] * -LN2) for i in (9, 10, 12)]
        soft = d_soft * inverse
        if reverse:
            soft = soft + d_reverse * (1.0 - inverse * stats[:, 5])
        zero = mx.zeros_like(soft)
        rows = [
            d_hard * scale[0],
            soft * scale[1],
            d_reverse * inverse * scale[1],
            -d_forward * scale[2],
            zero,
        ]
        rows += [stats[:, 8], zero, stats[:, 11], zero]
        inputs = {"z": z, "t": t, "ids": ids, "labels": labels, "par": par}
        inputs |= {"d_head": d_head, "d_label": d_label}
        slope = _slope(inputs, rows, power, hard, "reverse" if reverse else "gradient")
        return slope, *_zeros((t, ids, labels, par))

    return op  # type: ignore[no-any-return]


def _normalisers(stats: mx.array, head: mx.array, log_tail: mx.array, inverse: mx.array) -> list[mx.array]:
    """Tops and base-2 offsets: log2 q = (z - top) / (T ln 2) + offset, then the same of the teacher's p."""
    below = stats[:, 10] * LN2
    if head.shape[-1]:
        below = mx.logaddexp(below, mx.logsumexp((head - stats[:, 8:9]) * inverse, axis=-1))
    return [stats[:, 8], -below / LN2, stats[:, 11], log_tail / LN2 - stats[:, 12]]


@cache
def _divergence_op(power: int, hard: bool, mixture: bool) -> Callable[..., Any]:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def op(
        z: mx.array, t: mx.array, ids: mx.array, labels: mx.array, log_tail: mx.array, par: mx.array
    ) -> tuple[mx.array, ...]:
        n, k = ids.shape
        inputs = {"z": z, "t": t, "ids": ids, "labels": labels, "par": par}
        stats, head, label = _sums(inputs, power, hard, False)
        norms = padded(_normalisers(stats, head, log_tail, par[0]), 8)
        constants, threads = template("pair_divergence", z, k, MIXTURE=mixture)
        constants.append(("S", t.dtype))
        inputs = {"z": z, "t": t, "ids": ids, "par": par, "norms": norms}
        (result,) = dispatch.launch(
            "pair_divergence",
            inputs,
            {"result": ((n, 2), mx.float32)},
            template=constants,
            groups=n,
            threads=threads,
        )
        return stats[:, 0], stats[:, 1], head, label, result[:, 0], result[:, 1], stats, norms

    @op.vjp  # type: ignore[untyped-decorator]
    def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        z, t, ids, labels, log_tail, par = primals
        d_hard, d_soft, d_head, d_label, d_value, *_ = cotangents
        head, slope_sum, stats, norms = outputs[2], outputs[5], outputs[6], outputs[7]
        inverse = par[0]
        through = -inverse * d_value * slope_sum  # by way of the student's normaliser
        soft = inverse * d_soft * mx.exp(stats[:, 10] * -LN2) + through * mx.exp(norms[:, 1] * LN2)
        q_head = mx.exp((head - norms[:, :1]) * inverse + norms[:, 1:2] * LN2)
        zero = mx.zeros_like(soft)
        rows = [d_hard * mx.exp(stats[:, 9] * -LN2), soft, zero, zero, inverse * d_value]
        rows += [norms[:, i] for i in range(4)]
        inputs = {"z": z, "t": t, "ids": ids, "labels": labels, "par": par}
        inputs |= {"d_head": d_head + through[:, None] * q_head, "d_label": d_label}
        slope = _slope(inputs, rows, power, hard, "mixture" if mixture else "variation")
        return slope, *_zeros((t, ids, labels, log_tail, par))

    return op  # type: ignore[no-any-return]
