"""Sketch coordinates to byte planes and back: what the ids do not predict, rounded and packed.

Rows go through a few at a time, from the captured float to the packed byte, so that all of it stays in the
processor's cache and threads do not queue for fresh memory.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from schemas.arrays import Float32, Int32, TokenRows
from schemas.basis import SketchBasis
from schemas.errors import CorruptionError
from schemas.layout import group_columns
from schemas.packing import group_width, largest_byte, num_planes, pack_group, unpack_group
from schemas.planes import Planes
from schemas.predictor import SUBSTEPS

_BLOCK = 256


def encode_coordinates(
    coordinates: Float32, rows: TokenRows, head_ids: Int32, basis: SketchBasis, *, predicted: bool = False
) -> tuple[dict[str, Planes], int]:
    """The columns of the groups of coordinates.

    Args:
        coordinates: [n, r], finite inside the loss mask; what lies outside is stored as zeros.
        rows: the same tokens.
        head_ids: [n, k], all stored ids, from 0 to V-1.
        basis: step, groups and predictor.
        predicted: what the predictor says has been taken off.

    Returns:
        the planes by column, and how many values were clipped.
    """
    n, mask = len(coordinates), rows.loss_mask
    planes = [
        [np.empty((n, group_width(group)), np.uint8) for _ in range(num_planes(group.levels))]
        for group in basis.groups
    ]
    clipped, step = 0, np.float64(basis.step)
    for block, sums in _predictions(basis, rows.token_ids, head_ids, wanted=not predicted):
        quantized = coordinates[block] / step
        if sums is not None:
            quantized -= sums / SUBSTEPS
        np.rint(quantized, out=quantized)
        quantized[~mask[block]] = 0
        for group, stored in zip(basis.groups, planes, strict=True):
            values = quantized[:, group.start : group.stop]
            inside = np.clip(values, -group.largest, group.largest)
            clipped += int(np.count_nonzero(inside != values))
            pack_group(inside, group.levels, out=[plane[block] for plane in stored])
    names = [group_columns(index, group.levels) for index, group in enumerate(basis.groups)]
    pairs = zip(names, planes, strict=True)
    return {name: p for columns, stored in pairs for name, p in zip(columns, stored, strict=True)}, clipped


def decode_coordinates(
    planes: dict[str, Planes], basis: SketchBasis, rank: int, token_ids: Int32, head_ids: Int32
) -> Float32:
    """The leading `rank` coordinates, float32 [n, rank].

    Raises:
        CorruptionError: bytes that are no digits.
    """
    coordinates = np.empty((len(token_ids), rank), np.float32)
    for index, group in enumerate(basis.groups):
        if group.start < rank:
            names = group_columns(index, group.levels)
            if planes[names[0]].max(initial=0) > largest_byte(group.levels):
                raise CorruptionError(f"decode: bytes of '{names[0]}' must be digits of base {group.levels}")
            out = coordinates[:, group.start : min(group.stop, rank)]
            unpack_group([planes[name] for name in names], group, out, step=basis.step)
    if (tables := basis.tables(rank)) is not None:
        unit = np.float32(basis.step / SUBSTEPS)
        for block, sums in tables.sums(token_ids, head_ids):
            coordinates[block] += sums * unit
    return coordinates


def _predictions(
    basis: SketchBasis, token_ids: Int32, head_ids: Int32, *, wanted: bool
) -> Iterator[tuple[slice, npt.NDArray[np.int16] | None]]:
    """Some rows at a time, with predictions in units of step / 64 if there are any and they are wanted."""
    if wanted and (tables := basis.tables(basis.rank)) is not None:
        yield from tables.sums(token_ids, head_ids)
        return
    for start in range(0, len(token_ids), _BLOCK):
        yield slice(start, min(start + _BLOCK, len(token_ids))), None
