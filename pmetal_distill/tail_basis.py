"""The basis of a cache's sketches on the device: logits of the tail from coordinates. 4 V (r + 1) bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from pmetal_distill.reductions import NEGATIVE
from schemas.basis import NO_CEILING, SketchBasis


@dataclass(frozen=True, slots=True, eq=False)
class TailBasis:
    """The sketch's basis on the device; tail logits are `mean + components @ y`, cut at a ceiling.

    Attributes:
        mean: float32 [V].
        components: float32 [V, r].
        column_means: float32 [r], of `components` over the teacher's whole vocabulary; None for no ceiling.
        level: mean of `mean` over the teacher's whole vocabulary, less the margin of the ceiling.
    """

    mean: mx.array
    components: mx.array
    column_means: mx.array | None = None
    level: float = 0.0

    @staticmethod
    def from_sketch(basis: SketchBasis) -> "TailBasis":
        """Uploads a basis; do it once and share it between batches (4 V (r + 1) bytes)."""
        mean, components = mx.array(basis.mean), mx.array(basis.components)
        if not basis.has_ceiling:
            return TailBasis(mean, components)
        level, columns = basis.centre
        return TailBasis(mean, components, mx.array(columns.astype(np.float32)), level - basis.margin)

    @staticmethod
    def with_margins(basis: SketchBasis, margins: Sequence[float]) -> "list[TailBasis]":
        """The basis with each of the margins, uploaded once."""
        tail = TailBasis.from_sketch(basis.with_margin(0.0))
        return [
            replace(tail, level=tail.level - margin)
            if margin < NO_CEILING
            else replace(tail, column_means=None)
            for margin in margins
        ]

    def restricted(self, vocab_size: int) -> "TailBasis":
        """The basis of the first `vocab_size` tokens; the ceiling stays where it is."""
        return replace(self, mean=self.mean[:vocab_size], components=self.components[:vocab_size])

    def ceilings(self, coordinates: mx.array, slopes: mx.array) -> mx.array:
        """Largest tail logits [n] of coordinates [n, r] and slopes A'(0) [n]; `-NEGATIVE` for no ceiling."""
        if self.column_means is None:
            return mx.full(slopes.shape, -NEGATIVE)
        return self.level + coordinates @ self.column_means - slopes

    def logits(self, coordinates: mx.array) -> mx.array:
        """Coordinates [n, r] -> tail logits [n, V]; entries of the head are meaningless."""
        return mx.addmm(self.mean, coordinates, self.components.T)
