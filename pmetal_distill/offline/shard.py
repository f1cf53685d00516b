"""The Parquet files of one shard: written a row group at a time, flushed, read back with CRCs and compared.

Memory: one row group (about 4,096 tokens), whatever the size of the shard.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

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
Numbered = tuple[int, "CapturedSequence"]


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """Finished files in the scratch folder (path, bytes, SHA-256) and what is in them."""

    targets: Written
    hidden: Written | None
    groups: tuple[tuple[int, ...], ...]
    saturation: Saturation


def write_shard_files(
    scratch: Scratch,
    sequences: Iterable[Numbered],
    codec: Codec,
    hidden: HiddenCodec | None,
    dataset: Dataset,
) -> ShardFiles:
    """Write the target file and, with `hidden`, the hidden-state file of one shard.

    Raises:
        IncompatibleError: a sequence that does not fit.
        CorruptionError: a file did not read back as written.
    """
    targets = _ParquetFile(scratch.path("targets.parquet"), codec.schema)
    states = _ParquetFile(scratch.path("hidden.parquet"), hidden.schema) if hidden else None
    groups, saturation = [], Saturation()
    try:
        for group in _row_groups(sequences, dataset.rows_per_group):
            arrays, rows = _stack(group)
            table, clipped = encode(arrays, rows, codec)
            saturation += clipped
            targets.write(table)
            if hidden and states:
                states.write(encode_hidden(_stack_hidden(group, hidden), rows.loss_mask, hidden))
            groups.append(tuple(len(s.token_ids) for _, s in group))
        written = targets.finish()
        return ShardFiles(written, states.finish() if states else None, tuple(groups), saturation)
    finally:
        targets.abandon()
        if states:
            states.abandon()


class _ParquetFile:
    """A Parquet file being written, remembering a digest of each row group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._digests: list[str] = []
        self._handle: BinaryIO = path.open("xb")
        self._writer = pq.ParquetWriter(self._handle, schema, **parquet_options(schema))

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._digests.append(table_digest(table))

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


def _row_groups(sequences: Iterable[Numbered], rows_per_group: int) -> Iterator[list[Numbered]]:
    """Whole sequences until they reach `rows_per_group` tokens."""
    group: list[Numbered] = []
    size = 0
    for number, sequence in sequences:
        group.append((number, sequence))
        size += len(sequence.token_ids)
        if size >= rows_per_group:
            yield group
            group, size = [], 0
    if group:
        yield group


def _stack(group: list[Numbered]) -> tuple[TargetArrays, TokenRows]:
    for number, s in group:
        shapes = {s.token_ids.shape, s.documents.shape, s.loss_mask.shape, s.targets.leading}
        if shapes != {(len(s.token_ids),)}:
            raise IncompatibleError(f"sequence {number}: all arrays must have one length, found {shapes}")
    lengths = [len(s.token_ids) for _, s in group]
    rows = TokenRows(
        np.concatenate([s.token_ids for _, s in group]).astype(np.int32),
        np.repeat(np.array([number for number, _ in group], np.int32), lengths),
        np.concatenate([s.documents for _, s in group]).astype(np.int32),
        np.concatenate([s.loss_mask for _, s in group]).astype(np.bool_),
    )
    return TargetArrays.concatenate([s.targets for _, s in group]), rows


def _stack_hidden(group: list[Numbered], codec: HiddenCodec) -> dict[int, np.ndarray]:
    for number, sequence in group:
        if missing := set(codec.spec.layers) - set(sequence.hidden):
            raise IncompatibleError(
                f"sequence {number}: hidden layers must be there, missing {sorted(missing)}"
            )
    return {layer: np.concatenate([s.hidden[layer] for _, s in group]) for layer in codec.spec.layers}
