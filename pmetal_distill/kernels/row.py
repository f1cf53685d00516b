"""Sums over a row of student logits outside the target's head, and their gradient rows.

Forward: one read of [tokens, V]. Gradient: one read and one write; a row whose weights are 0 is only written.
Nothing here is differentiable by itself: the losses put the two together.
"""

from typing import Any, NamedTuple

import mlx.core as mx

from pmetal_distill.kernels import dispatch, tuning

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
PARAMETERS = 8
Template = list[tuple[str, Any]]


class TailSums(NamedTuple):
    """What `tail_sums` returns, float32.

    Attributes:
        top: [n], the largest logit outside the head; -1e30 where nothing is.
        hard: [n], ln of the sum outside the head of exp(z - top).
        soft: [n], ln of the sum outside the head of exp((z - top) / T).
        head: [n, k], z at the head's ids.
        label: [n], z at the label, 0 where the label is negative.
    """

    top: mx.array
    hard: mx.array
    soft: mx.array
    head: mx.array
    label: mx.array


def usable(logits: mx.array, k: int) -> bool:
    """Whether the row kernels take logits [n, V] of this size and type, now, with a head of k."""
    n, length = logits.shape
    fits = n > 0 and logits.size >= dispatch.SMALLEST_ARRAY and k <= length < 1 << 24
    return fits and logits.dtype in FLOATS and dispatch.platform() is not None


def tail_sums(logits: mx.array, ids: mx.array, labels: mx.array, inverse: mx.array) -> TailSums:
    """Log sums at T = 1 and T outside the head, and the logits of the head and the label.

    Args:
        logits: [n, V], float32, float16 or bfloat16.
        ids: int32 [n, k], distinct within a row; k may be 0.
        labels: int32 [n], negative where there is none.
        inverse: 1/T, scalar. T = 1, 2 and 4 save an exponential an element.
    """
    n, k = ids.shape
    constants, threads = template("tail_sums", logits, k)
    inputs = {"z": logits, "ids": ids, "labels": labels, "par": parameters(inverse)}
    outputs: dispatch.Outputs = {"stats": ((n, 4), mx.float32), **head_outputs(n, k)}
    stats, head, label = dispatch.launch(
        "tail_sums", inputs, outputs, template=constants, groups=n, threads=threads
    )
    return TailSums(stats[:, 0], stats[:, 1], stats[:, 2], head[:, :k], label)


def tail_slope(
    logits: mx.array,
    ids: mx.array,
    labels: mx.array,
    inverse: mx.array,
    *,
    weights: tuple[mx.array, mx.array, mx.array],
    head: mx.array,
    label: mx.array,
) -> mx.array:
    """Gradient rows hard exp(z - top) + soft exp((z - top) / T), in the logits' type.

    Args:
        logits, ids, labels, inverse: as for `tail_sums`.
        weights: hard, soft and top, each [n].
        head: [n, k], what stands at the head's ids instead.
        label: [n], added at the label.
    """
    n, k = ids.shape
    constants, threads = template("tail_sums_grad", logits, k)
    inputs = {"z": logits, "ids": ids, "labels": labels, "par": parameters(inverse)}
    inputs |= {"coefficients": padded(list(weights), 4), "d_head": head, "d_label": label}
    outputs: dispatch.Outputs = {"dz": (logits.shape, logits.dtype)}
    return dispatch.launch("tail_sums_grad", inputs, outputs, template=constants, groups=n, threads=threads)[
        0
    ]


def template(kernel: str, logits: mx.array, k: int, **constants: Any) -> tuple[Template, int]:
    """Template arguments that the row kernels share, and the threads of a threadgroup."""
    length, width = logits.shape[-1], tuning.vector_width(logits.dtype)
    shape = tuning.shape_for(kernel, dispatch.platform_name(), length=length, width=width)
    grain, bits = tuning.marks(length, width, k)
    values = {"T": logits.dtype, "V": length, "K": k, "W": width, "U": shape.unroll, "HINT": shape.hint}
    values |= {"TG": shape.threads, "GRAIN": grain, "BITS": bits, **constants}
    return list(values.items()), shape.threads


def head_outputs(n: int, k: int) -> dispatch.Outputs:
    """Outputs of the kernels that gather the head's and the label's logits."""
    return {"head": ((n, max(k, 1)), mx.float32), "label": ((n,), mx.float32)}


def parameters(inverse: mx.array, *others: float) -> mx.array:
    """[1/T, others ..., 0 ...] as float32 [8]: numbers that all rows share."""
    rest = (*others, *[0.0] * (PARAMETERS - 1 - len(others)))
    return mx.concatenate([inverse.astype(mx.float32).reshape(1), dispatch.constants(*rest)])


def padded(columns: list[mx.array], width: int) -> mx.array:
    """Vectors [n] as the first columns of float32 [n, width]."""
    zero = mx.zeros_like(columns[0])
    return mx.stack([*columns, *[zero] * (width - len(columns))], axis=-1).astype(mx.float32)
