"""Which sequences are held out of training: whole ones, chosen by the seed and the text alone. Costs a sort.

A document longer than a sequence is cut into several, so its parts may stand on both sides; for a split by
document evaluate on text of its own with `eval`.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pmetal_distill.offline.order import splitmix64
from schemas.errors import UsageError

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Holdout:
    """The two sides of a split, each ascending.

    Attributes:
        trained: sequence numbers that are trained on.
        held_out: the others; none if nothing is held out.
    """

    trained: Int64
    held_out: Int64

    @staticmethod
    def of(numbers: Int64, *, share: float, seed: int, text: str) -> "Holdout":
        """Holds out `share` of the sequences, at least one if it is positive.

        Args:
            numbers: all sequence numbers, ascending.
            share: in [0, 1).
            seed: another seed makes another split.
            text: names the content; another text makes another split.

        Raises:
            UsageError: nothing would be left to train on.
        """
        if share == 0:
            return Holdout(numbers, numbers[:0])
        count = max(1, round(share * len(numbers)))
        if count >= len(numbers):
            raise UsageError(
                f"val_share: must leave a sequence to train on, found {share:g} of {len(numbers)} sequences; "
                "give a smaller share or more text"
            )
        key = hashlib.sha256(f"held out:{text}:{seed}".encode()).digest()[:8]
        chosen = np.argsort(splitmix64(int.from_bytes(key, "little"), len(numbers)), kind="stable")[:count]
        held_out = np.zeros(len(numbers), np.bool_)
        held_out[chosen] = True
        return Holdout(numbers[~held_out], numbers[held_out])

    def spread(self, count: int) -> Int64:
        """At most `count` of the held-out sequences, evenly spread over the data."""
        if count >= len(self.held_out):
            return self.held_out
        return self.held_out[np.linspace(0, len(self.held_out) - 1, count).astype(np.int64)]
