"""NumPy arrays for the device, without slowing it down. Costs one copy on the host and the transfer.

On CUDA a kernel reads them from page-locked memory (`pinned`): an array that MLX makes of the host's numbers
is managed memory, and when it is given up the device runs dry first. Elsewhere MLX makes the array.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.kernels import backend
from pmetal_distill.kernels.from_host import THREADS, from_host
from pmetal_distill.pinned import Pinned, PinnedMemory, pinned_memory

DTYPES: dict[np.dtype[Any], mx.Dtype] = {
    np.dtype(np.bool_): mx.bool_,
    np.dtype(np.uint8): mx.uint8,
    np.dtype(np.int16): mx.int16,
    np.dtype(np.float16): mx.float16,
    np.dtype(np.int32): mx.int32,
    np.dtype(np.uint32): mx.uint32,
    np.dtype(np.float32): mx.float32,
}
WORD = 4
RING_WORDS = 1 << 23
MOST_WORDS = 1 << 21


def to_device(numbers: npt.NDArray[Any] | Any) -> mx.array:
    """The array on the device; the argument may change afterwards. Only for MLX's thread.

    Args:
        numbers: of any shape; what is no NumPy array goes to `mx.array` as it is.
    """
    if not isinstance(numbers, np.ndarray):
        return mx.array(numbers)
    memory = pinned_memory() if backend() == "cuda" and numbers.dtype in DTYPES and numbers.size else None
    ring = _ring(memory) if memory is not None else None
    if ring is None:
        return mx.array(numbers if numbers.flags.c_contiguous else np.ascontiguousarray(numbers))
    raw = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
    most = MOST_WORDS * WORD
    parts = [ring.send(raw[start : start + most]) for start in range(0, len(raw), most)]
    words = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    return words.view(DTYPES[numbers.dtype])[: numbers.size].reshape(numbers.shape)


@dataclass(slots=True, eq=False)
class Ring:
    """Memory that is written round and round; what the device has not read yet is waited for.

    Args:
        piece: the memory.
        stream: on which it is read, so that nothing need wait for the bus.
    """

    piece: Pinned
    stream: mx.Stream
    _next: int = 0
    _unread: deque[tuple[int, int, mx.array]] = field(default_factory=deque)

    def send(self, raw: npt.NDArray[np.uint8]) -> mx.array:
        """Bytes as words on the device, uint32; behind the last byte there may be others.

        Args:
            raw: at most `MOST_WORDS` words.
        """
        block = THREADS * WORD
        count = -(-len(raw) // block) * THREADS
        start = self._place(count)
        self.piece.words[start : start + count].view(np.uint8)[: len(raw)] = raw
        with mx.stream(self.stream):
            words = from_host(self.piece.address, start, count)
            mx.async_eval(words)
        self._unread.append((start, start + count, words))
        return words

    def _place(self, count: int) -> int:
        """Where to write next, when the device has read what was there."""
        start = self._next if self._next + count <= len(self.piece.words) else 0
        if start < self._next:  # what is left of the round before lies behind
            self._wait(self._next, len(self.piece.words))
        self._wait(start, start + count)
        self._next = start + count
        return start

    def _wait(self, start: int, end: int) -> None:
        """Until the oldest writes have been read, as long as they lie in these words."""
        while self._unread and self._unread[0][0] < end and self._unread[0][1] > start:
            mx.eval(self._unread.popleft()[2])


@cache
def _ring(memory: PinnedMemory) -> Ring | None:
    piece = memory.take(RING_WORDS * WORD)
    return None if piece is None else Ring(piece, memory.inputs)
