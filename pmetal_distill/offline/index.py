"""Where each sequence lies. Memory: 20 bytes a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmetal_distill.offline.shard_reader import Shard
from schemas.errors import IncompatibleError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SequenceIndex:
    """Row groups and lengths of the sequences that can be read.

    Attributes:
        groups: (shard, row group inside it) of every row group.
        numbers: int64 [N], numbers of the sequences, ascending.
        lengths: int64 [N], their tokens.
        starts: int64 [groups + 1]; row group g holds `numbers[starts[g]:starts[g + 1]]`.
    """

    groups: tuple[tuple[Shard, int], ...]
    numbers: Int64
    lengths: Int64
    starts: Int64

    @staticmethod
    def of(shards: Sequence[Shard]) -> "SequenceIndex":
        """The index of shards in ascending order."""
        groups = tuple((shard, g) for shard in shards for g in range(len(shard.record.groups)))
        numbers = [np.array(shard.sequence_numbers(g), np.int64) for shard, g in groups]
        lengths = [np.array(shard.record.groups[g], np.int64) for shard, g in groups]
        empty = np.zeros(0, np.int64)
        return SequenceIndex(
            groups,
            np.concatenate([empty, *numbers]),
            np.concatenate([empty, *lengths]),
            np.cumsum([0, *map(len, numbers)], dtype=np.int64),
        )

    def position(self, number: int) -> int:
        """Index of a sequence in `numbers`.

        Raises:
            IncompatibleError: not there.
        """
        at = int(np.searchsorted(self.numbers, number))
        if at == len(self.numbers) or self.numbers[at] != number:
            must = f"must be one of the {len(self.numbers)} in the cache"
            raise IncompatibleError(f"sequence {number}: {must}, found none; see 'pmetal-pipeline inspect'")
        return at

    def group_of(self, number: int) -> int:
        """The row group that holds a sequence."""
        return int(np.searchsorted(self.starts, self.position(number), side="right")) - 1

    def longest(self, numbers: npt.ArrayLike) -> int:
        """Tokens in the longest of some sequences."""
        return int(self.lengths[np.searchsorted(self.numbers, np.asarray(numbers))].max())

    def members(self) -> list[Int64]:
        """Sequence numbers of each row group."""
        return np.split(self.numbers, self.starts[1:-1])
