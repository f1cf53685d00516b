"""Capture: teacher logits -> exact head, tail curve and sketch coordinates. On the CPU 0.15 ms a token.

On a GPU the row kernel does it (`kernels.capture`), queued behind the head's products, and one array comes
back for all rows. On the CPU NumPy reads the logits of MLX in place, a row at a time, so that all passes over
a row hit the processor's cache: the top k from maxima of strided groups, and all nodes of the curve as
products of powers of one exponential. `python benchmarks/fidelity.py` times it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.device import on_cuda, on_gpu
from pmetal_distill.host_inputs import to_device
from pmetal_distill.host_results import HostCopy
from pmetal_distill.kernels.capture import capture as capture_on_device
from pmetal_distill.losses.plain import token_slices
from pmetal_distill.offline.row_capture import RowCapture, non_finite
from schemas.arrays import Float32, TargetArrays
from schemas.errors import IncompatibleError, NonFiniteError
from schemas.spec import TargetSpec

Rows = mx.array | npt.NDArray[Any]
Place = Callable[[int], str]
_TF32_BITS = np.uint32(0xFFFFE000)


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
    _device: dict[str, mx.array] = field(default_factory=dict, init=False, repr=False)

    @property
    def rank(self) -> int:
        """r."""
        return len(self.offset)

    def coordinates(self, hidden: Rows | None, logits: Rows | None) -> Float32:
        """Coordinates [n, r] of hidden states [n, d] or logits [n, V], whichever `source` says."""
        rows = as_numpy(self._chosen(hidden, logits))
        return np.asarray(rows @ self.projection.T + self.offset, np.float32)

    def queued(self, hidden: mx.array | None, logits: mx.array | None) -> mx.array:
        """The same on the device.

        Products of float32 may run with the 11 digits of TF32 there, so the projection goes in as two parts
        of 11 digits each. (Half-precision rows have no more; float32 rows are rounded like the logits were.)
        """
        rows = self._chosen(hidden, logits)
        if not self._device:
            high = (self.projection.view(np.uint32) & _TF32_BITS).view(np.float32)
            parts = np.concatenate([high, self.projection - high])
            self._device.update(parts=mx.array(parts), offset=mx.array(self.offset))
        product: mx.array = rows.astype(mx.float32) @ self._device["parts"].T
        return product[:, : self.rank] + product[:, self.rank :] + self._device["offset"]

    def _chosen(self, hidden: Any, logits: Any) -> Any:
        rows = hidden if self.source == "hidden" else logits
        if rows is None or rows.shape[-1] != self.projection.shape[1]:
            found = "none" if rows is None else str(rows.shape)
            raise IncompatibleError(
                f"capture: the sketch needs {self.source} [n, {self.projection.shape[1]}], found {found}"
            )
        return rows


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
    return capturing(logits, spec, hidden=hidden, sketch=sketch, first_row=first_row)()


def capturing(
    logits: Rows,
    spec: TargetSpec,
    *,
    hidden: Rows | None = None,
    sketch: CoordinateMap | None = None,
    first_row: int = 0,
) -> Callable[[], TargetArrays]:
    """A `capture` that a GPU begins with at once; the function returned waits for it, or does the work."""
    _check_logits(logits, spec)

    def place(row: int) -> str:
        return f"capture row {first_row + row}"

    if isinstance(logits, mx.array) and on_gpu():
        states = to_device(hidden) if isinstance(hidden, np.ndarray) else hidden
        copy = HostCopy(_queued(logits, states, spec, sketch))
        return lambda: _received(copy.take(), spec, place)
    return lambda: _on_host(logits, hidden, spec, sketch, place)


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
    return PendingCapture(mx.array(hidden), logits_of, spec, sketch=sketch, chunk=chunk).result()


class PendingCapture:
    """A `capture_hidden` that a GPU works on while the caller does something else.

    On a GPU the whole of it is queued at once, and `wait` waits for it and not for what was queued since; on
    the CPU, whose cores the forward pass keeps busy anyway, `result` does the work. Takes the arguments of
    `capture_hidden`, and:

    Args:
        place: number of a row -> its name for messages.
        predict: on a GPU, for a sketch of hidden states: (coordinates [n, r], head ids [n, k]) -> coordinates
            less what ids predict of them.
    """

    def __init__(
        self,
        hidden: mx.array,
        logits_of: Callable[[mx.array], mx.array],
        spec: TargetSpec,
        *,
        sketch: CoordinateMap | None = None,
        chunk: int = 256,
        place: Place = "capture row {}".format,
        predict: Callable[[mx.array, mx.array], mx.array] | None = None,
    ) -> None:
        self._hidden = hidden
        self._logits_of = logits_of
        self._spec = spec
        self._sketch = sketch
        self._chunk = chunk
        self._place = place
        self._predict = predict if sketch is not None and sketch.source == "hidden" else None
        self._queued = self._queue() if on_gpu() and len(hidden) else None

    @property
    def predicted(self) -> bool:
        """Whether the coordinates of the result lack what ids predict."""
        return self._predict is not None and self._queued is not None

    def wait(self) -> None:
        """Until a GPU is done; for the thread that uses MLX. Any other may then call `result`."""
        if self._queued is not None:
            self._queued.wait()

    def result(self) -> TargetArrays:
        """The targets; call it once.

        Raises:
            NonFiniteError, IncompatibleError: as in `capture`.
        """
        if self._queued is not None:
            return _received(self._queued.take(), self._spec, self._place)
        if len(self._hidden):
            starts = range(0, len(self._hidden), self._chunk)
            return TargetArrays.concatenate([self._on_host(start) for start in starts])
        rank = self._sketch.rank if self._sketch else 0
        return TargetArrays.empty(0, k=self._spec.k, num_nodes=self._spec.num_nodes, rank=rank)

    def _logits(self, rows: slice) -> tuple[mx.array, mx.array]:
        states = self._hidden[rows]
        logits = self._logits_of(states)
        _check_logits(logits, self._spec)
        return states, logits

    def _queue(self) -> HostCopy:
        """Queues chunk after chunk, so that the logits of one are given up before those of the next."""
        of_logits = self._sketch if self._sketch and self._sketch.source == "logits" else None
        parts = []
        for rows in token_slices(len(self._hidden), self._chunk):
            parts.append(_queued(self._logits(rows)[1], None, self._spec, of_logits))
            mx.async_eval(parts[-1])
        if self._sketch is not None and of_logits is None:
            head, coordinates = mx.concatenate(parts), self._sketch.queued(self._hidden, None)
            if self._predict is not None:
                coordinates = self._predict(coordinates, head[:, : self._spec.k])
            return HostCopy(mx.concatenate([head, coordinates.view(mx.int32)], axis=-1))
        return HostCopy(mx.concatenate(parts))

    def _on_host(self, start: int) -> TargetArrays:
        states, logits = self._logits(slice(start, start + self._chunk))
        return _on_host(logits, states, self._spec, self._sketch, lambda row: self._place(start + row))


def rows_at_once(asked: int | None, vocab_size: int) -> int:
    """Rows of logits that exist at once where nobody asked: 256 on a CPU.

    On a GPU a gigabyte of 16-bit ones, or two where the GPU has memory of its own (CUDA).
    """
    if asked is not None:
        return asked
    most = 1 << (30 if on_cuda() else 29)
    return min(max(most // vocab_size // 256 * 256, 256), 8192) if on_gpu() else 256


def as_numpy(rows: Rows) -> npt.NDArray[np.float32]:
    """float32 rows; a view where the memory is already that."""
    if isinstance(rows, mx.array):
        rows = np.array(rows.astype(mx.float32), copy=False)
    return np.asarray(rows, np.float32)


def _check_logits(logits: Rows, spec: TargetSpec) -> None:
    if logits.ndim != 2 or logits.shape[1] != spec.vocab_size:
        raise IncompatibleError(f"capture: logits must be [n, {spec.vocab_size}], found {logits.shape}")


def _on_host(
    logits: Rows, hidden: Rows | None, spec: TargetSpec, sketch: CoordinateMap | None, place: Place
) -> TargetArrays:
    head = RowCapture(spec).rows(as_numpy(logits), place=place)
    coordinates = sketch.coordinates(hidden, logits) if sketch else np.zeros((len(head[0]), 0), np.float32)
    _require_finite(np.asarray(np.isfinite(coordinates).all(axis=1)), place)
    return TargetArrays(*head, coordinates)


def _queued(
    logits: mx.array, hidden: mx.array | None, spec: TargetSpec, sketch: CoordinateMap | None
) -> mx.array:
    """All that is captured as one array, so that one copy brings it to the host: int32 [n, 2 k + m + 2 + r].

    Columns: ids; bits of the head's logits, the curve, log-sum-exp, smallest logit and coordinates.
    """
    found = capture_on_device(logits, k=spec.k, nodes=spec.curve_nodes)
    columns = [found.scores, found.curve, found.lse[:, None], found.lowest[:, None]]
    if sketch is not None:
        columns.append(sketch.queued(hidden, logits))
    return mx.concatenate([found.ids, *(column.view(mx.int32) for column in columns)], axis=-1)


def _received(bits: npt.NDArray[np.int32], spec: TargetSpec, place: Place) -> TargetArrays:
    """Targets from what `_queued` makes."""
    values = bits.view(np.float32)
    k, end = spec.k, 2 * spec.k + spec.num_nodes
    ok = np.isfinite(values[:, end : end + 2]).all(axis=1)
    if not ok.all():
        raise non_finite(place(int(ok.argmin())))
    coordinates = values[:, end + 2 :]
    _require_finite(np.isfinite(coordinates.sum(axis=1)), place)
    logprobs = values[:, k : 2 * k] - values[:, end : end + 1]
    return TargetArrays(bits[:, :k], logprobs, values[:, 2 * k : end], coordinates)


def _require_finite(ok: npt.NDArray[Any], place: Place) -> None:
    if not ok.all():
        raise NonFiniteError(
            f"{place(int(ok.argmin()))}: hidden states must be finite; "
            "see that the teacher's weights are whole and that it runs in a wide enough type"
        )
