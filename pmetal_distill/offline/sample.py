"""Sampled tokens as a calibration takes them: their states, and logits made again in each pass, in chunks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.host_inputs import to_device
from pmetal_distill.offline.capture import CoordinateMap, as_numpy, capture
from schemas.arrays import Float32, Int32, TargetArrays
from schemas.spec import TargetSpec


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Sampled tokens whose logits can be had again and again.

    Attributes:
        states: [n, d], final hidden states of trained positions, spread over the data set.
        logits_of: hidden states [m, d] -> logits [m, V]. Where a model cannot be split, `states` are the
            logits themselves and this returns its argument.
        chunk: rows of logits at once.
        token_ids: int32 [n], input ids at the same positions; without them nothing is predicted from ids.
    """

    states: npt.NDArray[np.float32]
    logits_of: Callable[[mx.array], mx.array]
    chunk: int = 256
    token_ids: Int32 | None = None

    def __len__(self) -> int:
        return len(self.states)

    def chunks(self) -> Iterator[tuple[Float32, mx.array]]:
        """(hidden states, logits) of successive rows."""
        for start in range(0, len(self.states), self.chunk):
            states = self.states[start : start + self.chunk]
            yield states, self.logits_of(to_device(states))

    def ids_from(self, start: int, count: int) -> Int32 | None:
        """Input ids of so many rows."""
        return None if self.token_ids is None else self.token_ids[start : start + count]

    def logits(self) -> Iterator[Float32]:
        """The logits alone."""
        return (as_numpy(logits) for _, logits in self.chunks())

    def thinned(self, rows: int) -> "Sample":
        """At most `rows` of the rows, evenly spread."""
        if len(self) <= rows:
            return self
        kept = np.linspace(0, len(self) - 1, rows).astype(int)
        token_ids = None if self.token_ids is None else self.token_ids[kept]
        return replace(self, states=self.states[kept], token_ids=token_ids)

    def captured(self, spec: TargetSpec, made: CoordinateMap | None) -> TargetArrays:
        """Exact targets of all rows."""
        parts = [capture(z, spec, hidden=h, sketch=made) for h, z in self.chunks()]
        return TargetArrays.concatenate(parts)
