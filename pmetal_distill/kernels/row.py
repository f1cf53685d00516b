"""Statistics of a student's row of logits outside the target's head: everything a sparse target needs.

Forward: one read of [tokens, V]. Vector-Jacobian product: one read and one write. Every loss on a sparse
target is ordinary autodiff over the small results. Plain operations, where no kernel runs, cost more passes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from pmetal_distill.kernels import dispatch, parameters, plain, tuning

LN2 = 0.6931471805599453


class RowStats(NamedTuple):
    """What `row_stats` returns, all float32 and differentiable with respect to the logits.

    Attributes:
        tail_lse1: [n], ln sum exp(z_j) over the columns outside the head; -1e30 where there are none.
        tail_lse: [n], ln sum exp(z_j / T) over the same columns.
        head: [n, k], z at the head's ids.
        label: [n], z at the label, 0 where the label is negative.
    """

    tail_lse1: mx.array
    tail_lse: mx.array
    head: mx.array
    label: mx.array


def row_stats(
    logits: mx.array,
    head_ids: mx.array,
    labels: mx.array,
    *,
    temperature: float | mx.array,
    hard: bool = True,
) -> RowStats:
    """Log-sum-exp outside the head at T = 1 and T, and the logits of the head and the label.

    Args:
        logits: [n, V], float32, float16 or bfloat16; sums are float32.
        head_ids: int32 [n, k], distinct within a row; k may be 0. Rows with a zero cotangent may repeat ids.
        labels: int32 [n], negative where there is none.
        temperature: > 0. A Python number that is whole (2.0) saves an exponential an element.
        hard: False leaves out the sum at T = 1 (`tail_lse1` is then 0).
    """
    if usable(logits, head_ids.shape[-1]):
        op = _kernel_op(tuning.whole_power(temperature), hard)
    else:
        op = _plain_op(hard)
    ids, marks = head_ids.astype(mx.int32), labels.astype(mx.int32)
    *results, _ = op(logits, ids, marks, parameters.pack(temperature))
    return RowStats(*results)


def usable(logits: mx.array, k: int) -> bool:
    """Whether a kernel takes this array; plain operations do where it does not."""
    n, length = logits.shape
    fits = n > 0 and logits.size >= dispatch.SMALLEST_ARRAY and k <= length < 1 << 24
    return fits and logits.dtype in plain.FLOATS and dispatch.platform() is not None


def template(kernel: str, logits: mx.array, k: int, **constants: Any) -> tuple[list[tuple[str, Any]], int]:
    """Template arguments that the row kernels share, and the threads of a threadgroup."""
    given = dispatch.platform()
    length, width = logits.shape[-1], tuning.vector_width(logits.dtype)
    shape = tuning.shape_for(kernel, given.name if given else "", length=length, width=width)
    grain, bits = tuning.marks(length, width, k)
    values = {"T": logits.dtype, "V": length, "K": k, "W": width, "U": shape.unroll, "HINT": shape.hint}
    values |= {"TG": shape.threads, "GRAIN": grain, "BITS": bits, **constants}
    return list(values.items()), shape.threads


def head_outputs(n: int, k: int) -> dispatch.Outputs:
    """Outputs of the kernels that gather the head's and the label's logits."""
    return {"head": ((n, max(k, 1)), mx.float32), "label": ((n,), mx.float32)}


def padded(rows: list[mx.array], width: int) -> mx.array:
    """Vectors [n] as the first columns of float32 [n, width]."""
    return mx.pad(mx.stack(rows, axis=-1), [(0, 0), (0, width - len(rows))])


@cache
def _kernel_op(power: int, hard: bool) -> Callable[..., Any]:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def op(logits: mx.array, ids: mx.array, labels: mx.array, par: mx.array) -> tuple[mx.array, ...]:
        n, k = ids.shape
        constants, threads = template("tail_sums", logits, k, POWER=power, HARD=hard)
        inputs = {"z": logits, "ids": ids, "labels": labels, "par": par}
        outputs: dispatch.Outputs = {"stats": ((n, 8), mx.float32), **head_outputs(n, k)}
        stats, head, label = dispatch.launch(
            "tail_sums", inputs, outputs, template=constants, groups=n, threads=threads
        )
        return stats[:, 0], stats[:, 1], head[:, :k], label, stats

    @op.vjp  # type: ignore[untyped-decorator]
    def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        logits, ids, labels, par = primals
        d_hard, d_soft, d_head, d_label, _ = cotangents
        stats = outputs[4]
        n, k = ids.shape
        scale = mx.exp(stats[:, 3:5] * -LN2)
        rows = [d_hard * scale[:, 0], d_soft * par[0] * scale[:, 1], stats[:, 2]]
        constants, threads = template("tail_sums_grad", logits, k, POWER=power, HARD=hard)
        inputs = {"z": logits, "ids": ids, "labels": labels, "par": par, "coefficients": padded(rows, 8)}
        inputs |= {"d_head": d_head, "d_label": d_label}
        (slope,) = dispatch.launch(
            "tail_sums_grad",
            inputs,
            {"dz": (logits.shape, logits.dtype)},
            template=constants,
            groups=n,
            threads=threads,
        )
        return slope, mx.zeros_like(ids), mx.zeros_like(labels), mx.zeros_like(par)

    return op  # type: ignore[no-any-return]


@cache
def _plain_op(hard: bool) -> Callable[..., Any]:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def op(logits: mx.array, ids: mx.array, labels: mx.array, par: mx.array) -> tuple[mx.array, ...]:
        z = plain.without_head(logits, ids)
        lse1 = plain.logsumexp(z) if hard else mx.zeros((len(ids),))
        soft = plain.logsumexp(z * par[0])
        head, label = plain.gather(logits, ids, labels)
        return lse1, soft, head, label, par

    @op.vjp  # type: ignore[untyped-decorator]
    def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        logits, ids, labels, par = primals
        d_hard, d_soft, d_head, d_label, _ = cotangents
        z = logits.astype(mx.float32)
        slope = (d_soft * par[0])[:, None] * mx.exp(z * par[0] - outputs[1][:, None])
        if hard:
            slope = slope + d_hard[:, None] * mx.exp(z - outputs[0][:, None])
        slope = plain.with_head(slope, ids, labels, d_head, d_label).astype(logits.dtype)
        return slope, mx.zeros_like(ids), mx.zeros_like(labels), mx.zeros_like(par)

    return op  # type: ignore[no-any-return]
