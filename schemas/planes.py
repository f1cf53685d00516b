"""Integers as byte planes, byte planes as Arrow columns. Cost: one pass a plane; Arrow shares the memory.

Plane 0 holds the low bytes. A plane that is nearly constant compresses to nothing, so a wide type costs bytes
only where its range is used.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Planes = npt.NDArray[np.uint8]


def split_planes(values: npt.NDArray[Any], num_planes: int) -> list[Planes]:
    """The low `num_planes` bytes of non-negative integers [n, width], each uint8 [n, width]."""
    return [(values >> (8 * i)).astype(np.uint8) for i in range(num_planes)]


def join_planes(planes: list[Planes]) -> npt.NDArray[np.int32]:
    """int32 integers from at most 3 planes, low bytes first."""
    total = planes[0].astype(np.int32)
    for i, plane in enumerate(planes[1:], start=1):
        total |= np.left_shift(plane, 8 * i, dtype=np.int32)
    return total


def to_column(plane: Planes) -> pa.Array:
    """A fixed_size_binary column of the rows of uint8 [n, width]."""
    plane = np.ascontiguousarray(plane)
    kind = pa.binary(plane.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(plane), [None, pa.py_buffer(plane)])


def from_column(column: pa.ChunkedArray) -> Planes:
    """uint8 [n, width], read-only where the column is one chunk."""
    width = column.type.byte_width
    chunks = [
        np.frombuffer(c.buffers()[1], np.uint8, len(c) * width, c.offset * width).reshape(len(c), width)
        for c in column.chunks
        if len(c)
    ]
    if not chunks:
        return np.zeros((0, width), np.uint8)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
