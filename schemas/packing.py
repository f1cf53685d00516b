"""Small signed integers as digits of a base, several to a byte. Cost: a table look-up per byte to unpack.

zstd's Huffman coder spends at least one bit a symbol, so coordinates that are mostly zero share a byte.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.basis import CoordinateGroup
from schemas.planes import Planes

DIGITS_PER_BYTE = {255: 1, 15: 2, 5: 3, 3: 5}


def group_width(group: CoordinateGroup) -> int:
    """Bytes per token and plane of a group."""
    return -(-(group.stop - group.start) // DIGITS_PER_BYTE.get(group.levels, 1))


def largest_byte(levels: int) -> int:
    """The largest byte that digits of this base make."""
    return 255 if levels == 65536 else levels ** DIGITS_PER_BYTE[levels] - 1


def num_planes(levels: int) -> int:
    """Byte planes that values of so many levels take."""
    return 2 if levels == 65536 else 1


def pack_group(values: npt.NDArray[Any], levels: int, out: list[Planes]) -> None:
    """Byte planes of whole numbers [n, width] within +-(levels // 2), written into `out`.

    Digit i of a byte is `value mod levels` times `levels ** i`; 65536 levels are two planes, low bytes first.
    Zeros give zero bytes.
    """
    if levels == 65536:
        whole = values.astype(np.int16, copy=False)
        np.copyto(out[0], whole, casting="unsafe")
        np.copyto(out[1], whole >> 8, casting="unsafe")
        return
    signed = values.astype(np.int8)
    digits = signed.view(np.uint8) + ((signed >> 7).view(np.uint8) & np.uint8(levels))
    per_byte = DIGITS_PER_BYTE[levels]
    np.copyto(out[0], digits[:, ::per_byte])
    for i in range(1, per_byte):
        column = digits[:, i::per_byte]
        out[0][:, : column.shape[1]] += column * np.uint8(levels**i)


def unpack_group(
    planes: list[Planes], group: CoordinateGroup, out: npt.NDArray[np.float32], *, step: float
) -> None:
    """Write `step * value` of one group into `out`, float32 [n, width].

    `out` may be narrower than the group: the leading coordinates are kept.
    """
    width = out.shape[1]
    if group.levels == 65536:
        values = planes[1][:, :width].view(np.int8).astype(np.int16) << 8 | planes[0][:, :width]
        np.multiply(values, np.float32(step), out=out)
        return
    per_byte = DIGITS_PER_BYTE[group.levels]
    num_bytes = -(-width // per_byte)
    table = _digit_table(group.levels) * np.float32(step)
    unpacked = table.take(planes[0][:, :num_bytes], axis=0)
    out[:] = unpacked.reshape(len(out), num_bytes * per_byte)[:, :width]


@cache
def _digit_table(levels: int) -> npt.NDArray[np.float32]:
    """float32 [256, digits per byte]: the values that a byte stands for."""
    per_byte = DIGITS_PER_BYTE[levels]
    digits = np.arange(256)[:, None] // levels ** np.arange(per_byte) % levels
    return np.where(digits > levels // 2, digits - levels, digits).astype(np.float32)
