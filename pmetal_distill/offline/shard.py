"""The Parquet files of one shard: written a row group at a time, flushed, read back with CRCs and compared.

Memory: the row group at hand (about 4,096 tokens), whatever the size of the shard.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pmetal_distill.offline.commit import Scratch, flush_file, hash_stream, open_plain
from schemas.arrays import TargetArrays, TokenRows
from schemas.codec import Codec, Saturation, encode
from schemas.errors import CorruptionError, IncompatibleError
from schemas.hidden import HiddenCodec, encode_hidden
from schemas.layout import parquet_options
from schemas.manifest import Dataset

if TYPE_CHECKING:
    from pmetal_distill.offline.writer import CapturedSequence

Written = tuple[Path, int, str]
Digested = tuple[pa.Table, str]
Numbered = tuple[int, "CapturedSequence"]


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """Finished files in the scratch folder (path, bytes, SHA-256) and what is in them."""

    targets: Written
    hidden: Written | None
    groups: tuple[tuple[int, ...], ...]
    saturation: Saturation


@dataclass(frozen=True, slots=True, eq=False)
class EncodedGroup:
    """A row group as it is going to be stored.

    Attributes:
        lengths: tokens of its sequences.
        targets, hidden: tables with their digests.
        saturation: what was clipped.
    """

    lengths: tuple[int, ...]
    targets: Digested
    hidden: Digested | None
    saturation: Saturation


class RowGroups:
    """Cuts the sequences of one shard into row groups, as they come.

    Whole sequences go into a group until it has `rows_per_group` tokens.
    """

    def __init__(self, shard: int, dataset: Dataset) -> None:
        self._shard = shard
        self._numbers = dataset.shard_range(shard)
        self._dataset = dataset
        self._count = self._size = 0
        self._group: list[Numbered] = []

    def add(self, sequence: "CapturedSequence") -> list[Numbered]:
        """Takes the next sequence; the group that it completes, else an empty list.

        Raises:
            IncompatibleError: one too many, or too long.
        """
        length, most = len(sequence.token_ids), self._dataset.max_sequence_length
        if self._count == len(self._numbers):
            raise IncompatibleError(f"shard {self._shard}: must have {self._count} sequences, found more")
        number = self._numbers[self._count]
        if not 1 <= length <= most:
            must = f"must have 1 to {most} tokens"
            raise IncompatibleError(f"shard {self._shard} sequence {number}: {must}, found {length}")
        self._group.append((number, sequence))
        self._count += 1
        self._size += length
        return self._taken() if self._size >= self._dataset.rows_per_group else []

    def rest(self) -> list[Numbered]:
        """What is left at the end, perhaps nothing.

        Raises:
            IncompatibleError: too few sequences have come.
        """
        if self._count != len(self._numbers):
            must = f"must have {len(self._numbers)} sequences"
            raise IncompatibleError(f"shard {self._shard}: {must}, found {self._count}")
        return self._taken()

    def _taken(self) -> list[Numbered]:
        group, self._group, self._size = self._group, [], 0
        return group


class ShardDraft:
    """The files of one shard while they are written. `encode` may run on several threads at once.

    Args:
        scratch: where the files go.
        codec, hidden: layouts and sidecars.
        level: of zstd.
    """

    def __init__(self, scratch: Scratch, codec: Codec, hidden: HiddenCodec | None, *, level: int) -> None:
        self._codec, self._hidden = codec, hidden
        self._targets = _ParquetFile(scratch.path("targets.parquet"), codec.schema, level)
        self._states = _ParquetFile(scratch.path("hidden.parquet"), hidden.schema, level) if hidden else None
        self._groups: list[tuple[int, ...]] = []
        self._saturation = Saturation()
        self._finished: ShardFiles | None = None

    def encode(self, group: list[Numbered]) -> EncodedGroup:
        """The tables of a row group; touches nothing else.

        Raises:
            IncompatibleError: a sequence that does not fit.
            NonFiniteError: NaN or infinity in a trained row.
        """
        arrays, rows = _stack(group)
        predicted = {sequence.predicted for _, sequence in group}
        if len(predicted) > 1:
            raise IncompatibleError("encode: all sequences of a row group must be predicted, or none")
        table, clipped = encode(arrays, rows, self._codec, predicted=predicted.pop())
        states = None
        if self._hidden:
            states = encode_hidden(_stack_hidden(group, self._hidden), rows.loss_mask, self._hidden)
        return EncodedGroup(
            tuple(len(s.token_ids) for _, s in group),
            (table, table_digest(table)),
            None if states is None else (states, table_digest(states)),
            clipped,
        )

    def write(self, group: EncodedGroup) -> None:
        """Appends a row group."""
        self._targets.write(*group.targets)
        if self._states and group.hidden:
            self._states.write(*group.hidden)
        self._groups.append(group.lengths)
        self._saturation += group.saturation

    def finish(self) -> ShardFiles:
        """Flushes the files, reads them back, hashes them; once, however often it is called.

        Raises:
            CorruptionError: a file did not read back as written.
        """
        if self._finished is None:
            written = self._targets.finish()
            states = self._states.finish() if self._states else None
            self._finished = ShardFiles(written, states, tuple(self._groups), self._saturation)
        return self._finished

    def abandon(self) -> None:
        """Lets go of unfinished files; the scratch folder takes them with it when it ends."""
        self._targets.abandon()
        if self._states:
            self._states.abandon()


class _ParquetFile:
    """A Parquet file being written, remembering a digest of each row group."""

    def __init__(self, path: Path, schema: pa.Schema, level: int) -> None:
        self._path = path
        self._schema = schema
        self._digests: list[str] = []
        self._handle: BinaryIO = path.open("xb")
        self._writer = pq.ParquetWriter(self._handle, schema, **parquet_options(schema, level=level))

    def write(self, table: pa.Table, digest: str) -> None:
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._digests.append(digest)

    def finish(self) -> Written:
        """Close, flush, read back, hash."""
        self._writer.close()
        flush_file(self._handle)
        self._handle.close()
        with open_plain(self._path) as handle:
            self._compare(handle)
            return self._path, handle.seek(0, 2), hash_stream(handle)

    def abandon(self) -> None:
        """Let go of an unfinished file, which the scratch folder takes with it when it ends.

        Parquet's writer closes itself when collected, and would then write to a closed handle.
        """
        with suppress(OSError, ValueError):
            self._writer.close()
        self._writer.is_open = False
        with suppress(OSError):
            self._handle.close()

    def _compare(self, handle: BinaryIO) -> None:
        file = pq.ParquetFile(handle, page_checksum_verification=True, memory_map=False)
        digests = [
            table_digest(file.read_row_group(i, use_threads=False)) for i in range(file.num_row_groups)
        ]
        if digests != self._digests or not file.schema_arrow.equals(self._schema):
            raise CorruptionError(
                f"{self._path.name}: must read back as written; check the disk and run again"
            )


def table_digest(table: pa.Table) -> str:
    """A hash of a table's values, whatever its chunks."""
    digest = hashlib.blake2b(digest_size=16)
    for name in table.schema.names:
        column = table.column(name)
        digest.update(f"{name}:{column.type}:{len(column)};".encode())
        for chunk in column.chunks:
            if pa.types.is_fixed_size_binary(chunk.type):
                width = chunk.type.byte_width
                data = chunk.buffers()[1]
                digest.update(memoryview(data)[chunk.offset * width : (chunk.offset + len(chunk)) * width])
            else:
                digest.update(chunk.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _stack(group: list[Numbered]) -> tuple[TargetArrays, TokenRows]:
    for number, s in group:
        shapes = {s.token_ids.shape, s.documents.shape, s.loss_mask.shape}
        if shapes != {(len(s.token_ids),)}:
            raise IncompatibleError(f"sequence {number}: all arrays must have one length, found {shapes}")
    lengths = [len(s.token_ids) for _, s in group]
    rows = TokenRows(
        np.concatenate([s.token_ids for _, s in group]).astype(np.int32),
        np.repeat(np.array([number for number, _ in group], np.int32), lengths),
        np.concatenate([s.documents for _, s in group]).astype(np.int32),
        np.concatenate([s.loss_mask for _, s in group]).astype(np.bool_),
    )
    return _spelled_out(group, len(rows)), rows


def _spelled_out(group: list[Numbered], num_tokens: int) -> TargetArrays:
    """Targets of every position, zeros where there are none because the position is not trained."""
    first = group[0][1].targets
    sizes = (first.k, first.num_nodes, first.rank)
    whole = TargetArrays.empty(num_tokens, k=sizes[0], num_nodes=sizes[1], rank=sizes[2])
    start = 0
    for number, sequence in group:
        targets, mask = sequence.targets, sequence.loss_mask
        if (targets.k, targets.num_nodes, targets.rank) != sizes:
            must = f"targets must have the widths of sequence {group[0][0]}, {first.shapes()}"
            raise IncompatibleError(f"sequence {number}: {must}, found {targets.shapes()}")
        trained: Any = np.flatnonzero(mask)
        if targets.leading == mask.shape:
            trained = slice(None)
        elif targets.leading != trained.shape:
            must = f"targets must be those of all {len(mask)} positions or of the {len(trained)} trained ones"
            raise IncompatibleError(f"sequence {number}: {must}, found {targets.leading}")
        for all_of_them, part in zip(whole.parts(), targets.parts(), strict=True):
            all_of_them[start : start + len(mask)][trained] = part
        start += len(mask)
    return whole


def _stack_hidden(group: list[Numbered], codec: HiddenCodec) -> dict[int, np.ndarray]:
    for number, sequence in group:
        if missing := set(codec.spec.layers) - set(sequence.hidden):
            raise IncompatibleError(
                f"sequence {number}: hidden layers must be there, missing {sorted(missing)}"
            )
    return {layer: np.concatenate([s.hidden[layer] for _, s in group]) for layer in codec.spec.layers}
