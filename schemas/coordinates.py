"""Sketch coordinates to byte planes and back: what the ids do not predict, rounded and packed.

Rows are rounded a few at a time, so that their doubles stay in the processor's cache and threads do not queue
for fresh memory; small integers are packed all at once. Few long calls: each hands the interpreter's lock on,
and a GPU's other threads wait for it.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from schemas.arrays import Float32, Int32, TokenRows
from schemas.basis import CoordinateGroup, SketchBasis
from schemas.errors import CorruptionError
from schemas.layout import group_columns
from schemas.packing import group_width, largest_byte, num_planes, pack_group, unpack_group
from schemas.planes import Planes
from schemas.predictor import SUBSTEPS

_BLOCK = 512


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
    clipped, step, limits = 0, np.float64(basis.step), _limits(basis)
    whole = np.empty((n, basis.rank), np.int16)
    scratch = np.empty((2, min(n, _BLOCK), basis.rank))
    for block, sums in _predictions(basis, rows.token_ids, head_ids, wanted=not predicted):
        quantized, inside = scratch[:, : block.stop - block.start]
        np.divide(coordinates[block], step, out=quantized)
        if sums is not None:
            quantized -= sums / SUBSTEPS
        np.rint(quantized, out=quantized)
        if not (trained := mask[block]).all():
            quantized[~trained] = 0
        np.clip(quantized, -limits, limits, out=inside)
        clipped += int(np.count_nonzero(inside != quantized))
        np.copyto(whole[block], inside, casting="unsafe")
    planes = [_packed(whole[:, group.start : group.stop], group) for group in basis.groups]
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


def _limits(basis: SketchBasis) -> npt.NDArray[np.float64]:
    """The largest value of each coordinate, [r]."""
    widths = [group.stop - group.start for group in basis.groups]
    return np.repeat([np.float64(group.largest) for group in basis.groups], widths)


def _packed(values: npt.NDArray[np.int16], group: CoordinateGroup) -> list[Planes]:
    planes = [np.empty((len(values), group_width(group)), np.uint8) for _ in range(num_planes(group.levels))]
    pack_group(values, group.levels, out=planes)
    return planes
