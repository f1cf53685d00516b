"""Packed text, read as a cache of it would be: same row groups, same order, same padding, no targets.

An online run and one from a cache of the same data therefore see the same batches, if the cache was made with
the default shard size. Memory: that of the packed text, which is bounded (`pipeline.data.packing`),
and 8 bytes a sequence.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from pipeline.cache import ROWS_PER_GROUP
from pipeline.data import PackedDataset
from pipeline.settings import CacheSettings
from pmetal_distill.offline.batch import StoredSequence
from pmetal_distill.offline.batches import BatchIterator, ReadOptions, Sequences, read_batches
from schemas.arrays import TargetArrays

SEQUENCES_PER_SHARD: Any = {f.name: f.default for f in fields(CacheSettings)}["sequences_per_shard"]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TextReader:
    """Batches of packed text.

    Args:
        data: what to read.
    """

    data: PackedDataset

    @property
    def text(self) -> str:
        """A hash that names the text, as `LogitCache.text`."""
        return self.data.fingerprint()

    @property
    def numbers(self) -> Int64:
        """Numbers of the sequences, ascending."""
        return np.arange(self.data.num_sequences, dtype=np.int64)

    def batches(self, *, batch_size: int, seed: int, **options: Unpack[ReadOptions]) -> BatchIterator:
        """Batches in the order of `LogitCache.batches`, whose arguments these are.

        Raises:
            IncompatibleError: a subset with sequences that are not there, or a state of another order.
        """
        groups, firsts = self._groups
        sequences = Sequences(
            self.text,
            self.text,
            groups,
            group_of=lambda number: int(np.searchsorted(firsts, number, side="right")) - 1,
            longest=lambda numbers: int(self.data.sequence_lengths(np.asarray(numbers)).max()),
            load=lambda group: {number: self._sequence(number) for number in groups[group].tolist()},
            empty=_no_targets(0),
        )
        return read_batches(sequences, batch_size=batch_size, seed=seed, **options)

    @cached_property
    def _groups(self) -> tuple[list[Int64], Int64]:
        """Numbers of the sequences of each row group, and the first of each."""
        lengths = self.data.sequence_lengths()
        groups = row_groups(lengths, per_shard=SEQUENCES_PER_SHARD, rows_per_group=ROWS_PER_GROUP)
        return groups, np.array([group[0] for group in groups], np.int64)

    def _sequence(self, number: int) -> StoredSequence:
        row = self.data.sequence(number)
        documents = row.documents - row.documents.min()
        mask = row.loss_mask.astype(np.bool_)
        return StoredSequence(number, row.token_ids, documents, mask, _no_targets(len(mask)), basis_index=-1)


def row_groups(lengths: Int64, *, per_shard: int, rows_per_group: int) -> list[Int64]:
    """Sequence numbers of the row groups that a cache of sequences of these lengths would have."""
    groups: list[Int64] = []
    start, size = 0, 0
    for number, length in enumerate(lengths.tolist()):
        size += length
        last_of_shard = (number + 1) % per_shard == 0 or number + 1 == len(lengths)
        if size >= rows_per_group or last_of_shard:
            groups.append(np.arange(start, number + 1, dtype=np.int64))
            start, size = number + 1, 0
    return groups


def _no_targets(num_tokens: int) -> TargetArrays:
    return TargetArrays.empty(num_tokens, k=0, num_nodes=0, rank=0)
