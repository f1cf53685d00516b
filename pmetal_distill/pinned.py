"""Memory of the host that a CUDA device writes to without the help of MLX. Kept for the whole process.

MLX's own way to the host is managed memory: it allocates, copies and frees there, each of which waits for all
that is queued, and it uses such memory again for arrays of the device, which then fault their pages back.
"""

import ctypes
import threading
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.device import on_cuda
from pmetal_distill.kernels.to_host import address_of

BLOCK = 1 << 21  # sizes are multiples of this, so that few are needed
_PORTABLE_AND_MAPPED = 3  # of cuda.h


@dataclass(frozen=True, slots=True, eq=False)
class Pinned:
    """A piece of page-locked memory.

    Attributes:
        words: uint32 [n], a view of it.
        address: what `kernels.to_host` takes.
    """

    words: npt.NDArray[np.uint32]
    address: mx.array


@dataclass(slots=True, eq=False)
class PinnedMemory:
    """Pieces that are given out and come back. Threads may give back; only MLX's thread may ask.

    Args:
        driver: the CUDA driver's library.
        inputs, results: streams of MLX on which copies to and from the device run, beside its work.
    """

    driver: Any
    inputs: mx.Stream
    results: mx.Stream
    _free: dict[int, list[Pinned]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, num_bytes: int) -> Pinned | None:
        """At least so many bytes; None where the driver has none to give."""
        size = -(-num_bytes // BLOCK) * BLOCK
        with self._lock:
            if free := self._free.get(size):
                return free.pop()
        pointer = ctypes.c_void_p()
        flags = ctypes.c_uint(_PORTABLE_AND_MAPPED)
        if self.driver.cuMemHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(size), flags):
            return None
        assert pointer.value is not None
        words = np.ctypeslib.as_array((ctypes.c_uint32 * (size // 4)).from_address(pointer.value))
        return Pinned(words, address_of(pointer.value))

    def give_back(self, piece: Pinned) -> None:
        """For the next who asks."""
        with self._lock:
            self._free.setdefault(piece.words.nbytes, []).append(piece)


@cache
def pinned_memory() -> PinnedMemory | None:
    """This process's, where MLX computes on CUDA."""
    if not on_cuda():
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = mx.default_device()
    return PinnedMemory(driver, inputs=mx.new_stream(device), results=mx.new_stream(device))
