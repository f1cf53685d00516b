"""Sums over pairs of hidden states that MSE and cosine losses are made of.

Forward: one read of both. Gradient: one read of both and one write.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from pmetal_distill.kernels import dispatch, tuning
from pmetal_distill.kernels.row import FLOATS, Template, padded


class HiddenSums(NamedTuple):
    """What `hidden_sums` returns: float32 [n], differentiable in both inputs.

    Attributes:
        square: sum of (s - t)^2.
        dot: sum of s t.
        student: sum of s^2.
        teacher: sum of t^2.
    """

    square: mx.array
    dot: mx.array
    student: mx.array
    teacher: mx.array


def hidden_sums(student: mx.array, teacher: mx.array) -> HiddenSums:
    """Sums over the last axis of two arrays [n, d] of any float types; float32 accumulation."""
    if _usable(student) and _usable(teacher):
        return HiddenSums(*_kernel_op()(student, teacher))
    s, t = student.astype(mx.float32), teacher.astype(mx.float32)
    pairs = ((s - t).square(), s * t, s.square(), t.square())
    return HiddenSums(*(p.sum(axis=-1) for p in pairs))


def _usable(states: mx.array) -> bool:
    return (
        dispatch.platform() is not None and states.size >= dispatch.SMALLEST_ARRAY and states.dtype in FLOATS
    )


def _template(kernel: str, s: mx.array, t: mx.array) -> tuple[Template, int, int]:
    n, length = s.shape
    width = tuning.vector_width(s.dtype)
    shape = tuning.shape_for(kernel, dispatch.platform_name(), length=width * 256, width=width)
    values: dict[str, Any] = {"T": s.dtype, "S": t.dtype, "D": length, "W": width, "HINT": shape.hint}
    values["TG"] = shape.threads
    rows_each = shape.threads // 32
    return list(values.items()), -(-n // rows_each), shape.threads


def _rows(n: int) -> mx.array:
    return mx.full((dispatch.SMALLEST_ARRAY,), n, mx.int32)


def launch_sums(s: mx.array, t: mx.array) -> mx.array:
    """The kernel of `hidden_sums`: its four results as the columns of float32 [n, 4]."""
    constants, groups, threads = _template("feature_sums", s, t)
    inputs = {"s": s, "t": t, "size": _rows(len(s))}
    outputs: dispatch.Outputs = {"sums": ((len(s), 4), mx.float32)}
    return dispatch.launch(
        "feature_sums", inputs, outputs, template=constants, groups=groups, threads=threads
    )[0]


def launch_slope(s: mx.array, t: mx.array, rows: list[mx.array]) -> mx.array:
    """The kernel of its gradient, rows[0] (s - t) + rows[1] s + rows[2] t, in the type of s."""
    constants, groups, threads = _template("feature_grad", s, t)
    inputs = {"s": s, "t": t, "coefficients": padded(rows, 4), "size": _rows(len(s))}
    outputs: dispatch.Outputs = {"ds": (s.shape, s.dtype)}
    return dispatch.launch(
        "feature_grad", inputs, outputs, template=constants, groups=groups, threads=threads
    )[0]


@cache
def _kernel_op() -> Callable[..., Any]:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def op(s: mx.array, t: mx.array) -> tuple[mx.array, ...]:
        sums = launch_sums(s, t)
        return tuple(sums[:, i] for i in range(4))

    @op.vjp  # type: ignore[untyped-decorator]
    def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        s, t = primals
        d_square, d_dot, d_student, d_teacher = cotangents
        return (
            launch_slope(s, t, [2.0 * d_square, 2.0 * d_student, d_dot]),
            launch_slope(t, s, [2.0 * d_square, 2.0 * d_teacher, d_dot]),
        )

    return op  # type: ignore[no-any-return]
