"""Results of a device as NumPy arrays, without slowing the device down. Costs one copy.

On CUDA a kernel writes them into page-locked memory (`pinned`), on a stream of its own, so that what is
queued next need not wait for the bus; elsewhere the memory is shared.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.kernels import backend
from pmetal_distill.kernels.to_host import to_host
from pmetal_distill.pinned import Pinned, pinned_memory

DTYPES: dict[mx.Dtype, type[np.generic]] = {
    mx.int32: np.int32,
    mx.uint32: np.uint32,
    mx.float32: np.float32,
}


class HostCopy:
    """A device array of 32-bit numbers on its way to the host, queued at once.

    `wait` belongs to the thread that uses MLX; then `take` may be called by any, once.

    Args:
        array: int32, uint32 or float32, not empty.
    """

    def __init__(self, array: mx.array) -> None:
        self._shape = array.shape
        self._dtype = DTYPES[array.dtype]
        self._size = array.size
        self._place: Pinned | None = None
        memory = pinned_memory() if backend() == "cuda" else None
        # By itself: an evaluation that spans two streams costs managed memory, and giving that up a pause.
        mx.async_eval(array)
        if memory is not None and (place := memory.take(array.nbytes)) is not None:
            self._place = place
            with mx.stream(memory.results):
                array = to_host(array.view(mx.uint32), place.address)
                mx.async_eval(array)
        self._array: mx.array | None = array
        self._view: npt.NDArray[Any] | None = None

    def wait(self) -> None:
        """Until the numbers are on the host."""
        if self._array is None:
            return
        mx.eval(self._array)
        if self._place is not None:
            self._view = self._place.words[: self._size].view(self._dtype).reshape(self._shape)
        else:
            self._view = np.array(self._array, copy=False)
        self._array = None

    def take(self) -> npt.NDArray[Any]:
        """A copy of the numbers, which is the caller's; waits first if nobody has."""
        self.wait()
        assert self._view is not None
        numbers, self._view = self._view.copy(), None
        memory = pinned_memory()
        if self._place is not None and memory is not None:
            memory.give_back(self._place)
        return numbers


def to_numpy(array: mx.array) -> npt.NDArray[Any]:
    """A copy of an array; waits for it. bfloat16, which NumPy lacks, comes as float32."""
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    if array.size and array.dtype in DTYPES:
        return HostCopy(array).take()
    return np.array(array)
