"""Capture: teacher logits -> exact head, tail curve and sketch coordinates. On the CPU 0.15 ms a token.

On a GPU the row kernel does it (`kernels.capture`). On the CPU NumPy reads the logits of MLX in place, a row
at a time, so that all passes over a row hit the processor's cache: the top k from maxima of strided groups,
and all nodes of the curve as products of powers of one exponential. `python benchmarks/fidelity.py` times it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.kernels.capture import capture as capture_on_device
from pmetal_distill.offline.row_capture import RowCapture, non_finite
from schemas.arrays import Float32, TargetArrays
from schemas.errors import IncompatibleError, NonFiniteError
from schemas.spec import TargetSpec

Rows = mx.array | npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class CoordinateMap:
    """y = projection @ x + offset, x a final hidden state or a row of logits. Needed at capture only.

    Attributes:
        source: what x is; "logits" where the head is not linear.
        projection: float32 [r, d] or [r, V].
        offset: float32 [r].
    """

    source: Literal["hidden", "logits"]
    projection: Float32
    offset: Float32

    @property
    def rank(self) -> int:
        """r."""
        return len(self.offset)

    def coordinates(self, hidden: Rows | None, logits: Rows | None) -> Float32:
        """Coordinates [n, r] of hidden states [n, d] or logits [n, V], whichever `source` says."""
        rows = hidden if self.source == "hidden" else logits
        if rows is None or rows.shape[-1] != self.projection.shape[1]:
            found = "none" if rows is None else str(rows.shape)
            raise IncompatibleError(
                f"capture: the sketch needs {self.source} [n, {self.projection.shape[1]}], found {found}"
            )
        return np.asarray(as_numpy(rows) @ self.projection.T + self.offset, np.float32)


def capture(
    logits: Rows,
    spec: TargetSpec,
    *,
    hidden: Rows | None = None,
    sketch: CoordinateMap | None = None,
    first_row: int = 0,
) -> TargetArrays:
    """The target of each row, exact: nothing is rounded here.

    Args:
        logits: [n, V] as the model gives them (after any scale or soft-cap); float32, float16 or bfloat16.
        spec: k, tail mode and curve nodes.
        hidden: [n, d], final hidden states of the same rows; needed where `sketch` maps them.
        sketch: for tail "sketch"; without it the coordinates stay empty (calibration).
        first_row: number of row 0, for messages.

    Raises:
        NonFiniteError: NaN or infinity in a row (names it).
        IncompatibleError: rows that do not fit `spec` or `sketch`.
    """
    if logits.ndim != 2 or logits.shape[1] != spec.vocab_size:
        raise IncompatibleError(f"capture: logits must be [n, {spec.vocab_size}], found {logits.shape}")
    if isinstance(logits, mx.array) and mx.default_device().type != mx.DeviceType.cpu:
        head = _on_device(logits, spec, first_row)
    else:
        head = RowCapture(spec).rows(as_numpy(logits), first_row=first_row)
    num_rows = len(head[0])
    coordinates = sketch.coordinates(hidden, logits) if sketch else np.zeros((num_rows, 0), np.float32)
    _require_finite(coordinates, first_row)
    return TargetArrays(*head, coordinates)


def capture_hidden(
    hidden: Rows,
    logits_of: Callable[[mx.array], mx.array],
    spec: TargetSpec,
    *,
    sketch: CoordinateMap | None = None,
    chunk: int = 256,
) -> TargetArrays:
    """The targets of final hidden states [n, d], `chunk` rows of logits at a time.

    Args:
        hidden: [n, d].
        logits_of: the model's head, hidden states [m, d] -> logits [m, V].
        spec, sketch: as in `capture`.
        chunk: rows of logits that exist at once.

    Raises:
        NonFiniteError, IncompatibleError: as in `capture`.
    """
    parts = []
    for start in range(0, hidden.shape[0], chunk):
        states = hidden[start : start + chunk]
        logits = logits_of(states if isinstance(states, mx.array) else mx.array(states))
        parts.append(capture(logits, spec, hidden=states, sketch=sketch, first_row=start))
    if parts:
        return TargetArrays.concatenate(parts)
    return TargetArrays.empty(0, k=spec.k, num_nodes=spec.num_nodes, rank=sketch.rank if sketch else 0)


def as_numpy(rows: Rows) -> npt.NDArray[np.float32]:
    """float32 rows; a view where the memory is already that."""
    if isinstance(rows, mx.array):
        rows = np.array(rows.astype(mx.float32), copy=False)
    return np.asarray(rows, np.float32)


def _on_device(
    logits: mx.array, spec: TargetSpec, first_row: int
) -> tuple[npt.NDArray[np.int32], Float32, Float32]:
    found = capture_on_device(logits, k=spec.k, nodes=spec.curve_nodes)
    finite = mx.isfinite(found.lse) & mx.isfinite(found.lowest)
    mx.eval(found, finite)
    ok = np.array(finite)
    if not ok.all():
        raise non_finite(first_row + int(ok.argmin()))
    return np.array(found.ids), np.array(found.scores - found.lse[:, None]), np.array(found.curve)


def _require_finite(coordinates: Float32, first_row: int) -> None:
    ok = np.isfinite(coordinates).all(axis=1)
    if not ok.all():
        raise NonFiniteError(
            f"capture row {first_row + int(ok.argmin())}: hidden states must be finite; "
            "see that the teacher's weights are whole and that it runs in a wide enough type"
        )
