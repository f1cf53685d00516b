"""Prediction of sketch coordinates from token ids: only what ids do not tell is stored.

The prediction is linear in the basis rows of the input token and of all stored head tokens, hence a sum of
rows of two int16 tables [V, r], made when a basis is first used (4 V r bytes; half a second at V=49k, r=256).
Sums of 16-bit integers are the same everywhere, so readers and writers agree. They reach 512 steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.arrays import Float32, Int32
from schemas.errors import IncompatibleError

SUBSTEPS = 64
MAX_ENTRY = 32767
_BLOCK, _TABLE_BLOCK, _CACHED = 128, 2048, 1 << 19

Int16 = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True, eq=False)
class PredictorTables:
    """What each token adds to a prediction, in units of step / 64.

    Attributes:
        head: int16 [V, r], of a head token.
        token: int16 [V, r], of the input token, with the constant.
    """

    head: Int16
    token: Int16

    def sums(self, token_ids: Int32, head_ids: Int32) -> Iterator[tuple[slice, Int16]]:
        """Predictions of a few rows at a time, in units.

        Few long calls rather than one a column, so that encoding threads do not queue for the interpreter's
        lock, and few enough rows for the processor's cache.

        Args:
            token_ids: [n]; all ids must be from 0 to V-1.
            head_ids: [n, k].

        Yields:
            the rows, and int16 [rows, r]; sums wrap around.
        """
        k, rank = head_ids.shape[1], self.head.shape[1]
        size = min(max(_CACHED // max(1, k * rank), 64), 256)
        scratch = np.empty((size * k, rank), np.int16)
        for start in range(0, len(token_ids), size):
            rows = slice(start, min(start + size, len(token_ids)))
            ids = head_ids[rows].astype(np.intp).ravel()
            part = self.head.take(ids, axis=0, out=scratch[: len(ids)], mode="clip")
            total = self.token.take(token_ids[rows], axis=0, mode="clip")
            total += np.add.reduce(part.reshape(len(total), k, rank), axis=1, dtype=np.int16)
            yield rows, total


@dataclass(frozen=True, slots=True, eq=False)
class SketchPredictor:
    """y is near constant + components[x] @ token + (sum over the head of components[id]) @ head.

    Attributes:
        head: float32 [r, r].
        token: float32 [r, r].
        constant: float32 [r].

    Raises:
        IncompatibleError: other shapes, or values that are not finite.
    """

    head: Float32
    token: Float32
    constant: Float32

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):
            for name in ("head", "token", "constant"):
                object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.float32))
        shapes = (self.head.shape, self.token.shape, self.constant.shape)
        r = self.rank
        if shapes != ((r, r), (r, r), (r,)):
            raise IncompatibleError(f"SketchPredictor: shapes must be [r, r], [r, r] and [r], found {shapes}")
        if not all(np.isfinite(a).all() for a in (self.head, self.token, self.constant)):
            raise IncompatibleError("SketchPredictor: values must be finite in float32")

    @property
    def rank(self) -> int:
        """r."""
        return int(self.constant.size)

    @staticmethod
    def fit(
        components: Float32,
        coordinates: Float32,
        token_ids: Int32,
        head_ids: Int32,
        *,
        ridge: float = 0.02,
    ) -> "SketchPredictor":
        """Least squares over a sample of trained (unmasked) tokens, in float64.

        Args:
            components: of the basis, [V, r]; rounded to float16 as they are stored.
            coordinates: [n, r], exact.
            token_ids: [n], input ids.
            head_ids: [n, k], all that will be stored.
            ridge: penalty on squared weights, as a share of the variance of their feature.

        Raises:
            IncompatibleError: no token, shapes that do not fit, ids outside the vocabulary.
        """
        stored = np.asarray(components, np.float16).astype(np.float32)
        _check_sample(stored, coordinates, token_ids, head_ids)
        n, r = coordinates.shape
        gram, cross = np.zeros((2 * r + 1, 2 * r + 1)), np.zeros((2 * r + 1, r))
        features = np.ones((_BLOCK, 2 * r + 1))
        for start in range(0, n, _BLOCK):
            rows = slice(start, min(start + _BLOCK, n))
            block = features[: rows.stop - start]
            block[:, :r] = stored.take(token_ids[rows], axis=0)
            block[:, r:-1] = 0
            for column in head_ids[rows].T:
                block[:, r:-1] += stored.take(column, axis=0)
            gram += block.T @ block
            cross += block.T @ coordinates[rows]
        mean, target = gram[-1, :-1] / n, cross[-1] / n
        inner = gram[:-1, :-1] - n * np.outer(mean, mean)
        spread = np.diag(inner)
        penalty = ridge * spread + 1e-9 * (spread.max() or 1.0)
        weights = np.linalg.solve(inner + np.diag(penalty), cross[:-1] - n * np.outer(mean, target))
        return SketchPredictor(
            weights[r:].astype(np.float32),
            weights[:r].astype(np.float32),
            (target - mean @ weights).astype(np.float32),
        )

    def tables(self, components: Float32, *, step: float, rank: int) -> PredictorTables:
        """Tables for the leading `rank` coordinates; entries saturate at +-32767.

        Args:
            components: of the basis, float32 [V, r], all r columns.
            step: of the basis.
            rank: columns wanted.
        """
        unit = np.float64(step) / SUBSTEPS
        weights = np.concatenate([self.head[:, :rank], self.token[:, :rank]], axis=1).astype(np.float64)
        tables = np.empty((2, len(components), rank), np.int16)
        for start in range(0, len(components), _TABLE_BLOCK):
            rows = slice(start, start + _TABLE_BLOCK)
            products = np.rint(components[rows].astype(np.float64) @ weights / unit)
            products[:, rank:] += np.rint(self.constant[:rank] / unit)
            entries = products.clip(-MAX_ENTRY, MAX_ENTRY).astype(np.int16)
            tables[0, rows], tables[1, rows] = entries[:, :rank], entries[:, rank:]
        return PredictorTables(*tables)


def _check_sample(
    components: Float32, coordinates: Float32, token_ids: Int32, head_ids: npt.NDArray[Any]
) -> None:
    n, r = coordinates.shape
    found = (components.shape[1:], token_ids.shape, head_ids.shape[:1])
    if n == 0 or found != ((r,), (n,), (n,)):
        raise IncompatibleError(
            f"SketchPredictor: components [V, r], token_ids [n] and head_ids [n, k] must fit coordinates "
            f"[n, r] = {coordinates.shape} with n > 0, found {found}"
        )
    for name, ids in (("token_ids", token_ids), ("head_ids", head_ids)):
        if ids.size and not 0 <= ids.min() <= ids.max() < len(components):
            raise IncompatibleError(
                f"SketchPredictor: {name} must be from 0 to {len(components) - 1}, "
                f"found {ids.min()} to {ids.max()}"
            )
