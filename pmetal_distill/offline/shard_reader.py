"""Decoded row groups of a cache, from files whose hash was checked before their first use.

Memory: one decoded row group a call, and the footers of the few files kept open. A file is hashed once per
content (inode, size, modification time) and process; every page's CRC is checked on every read. What footer
and page headers promise is held against the commit record once per open file, before memory is given for it.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pmetal_distill.offline.commit import check_folder, hash_stream, open_plain
from pmetal_distill.offline.footer import check_structure
from pmetal_distill.offline.pages import check_pages
from pmetal_distill.offline.store import Store
from schemas.arrays import TargetArrays, TokenRows
from schemas.codec import Codec, decode
from schemas.errors import CacheError, CorruptionError
from schemas.hidden import HiddenCodec, Layers, decode_hidden
from schemas.layout import MAX_GROUP_BYTES
from schemas.manifest import CommitRecord, FileRef

MAX_OPEN_FILES = 16
_SLACK_BYTES = 1 << 16
_THRIFT_LIMIT = 1 << 24
_DAMAGE = (OSError, pa.ArrowException, ValueError, MemoryError)


@dataclass(frozen=True, slots=True, eq=False)
class OpenFile:
    """A shard file whose bytes were checked, and the row groups and columns whose promises were."""

    handle: BinaryIO
    parquet: pq.ParquetFile
    sound: set[tuple[int, str]] = field(default_factory=set)


OpenFiles = OrderedDict[str, OpenFile]


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What is needed to decode one shard."""

    record: CommitRecord
    first_sequence: int
    codec: Codec
    hidden: HiddenCodec | None

    def sequence_numbers(self, group: int) -> range:
        """Sequences of a row group."""
        start = self.first_sequence + sum(len(g) for g in self.record.groups[:group])
        return range(start, start + len(self.record.groups[group]))


@dataclass(frozen=True, slots=True, eq=False)
class CheckedFiles:
    """What all readers of a cache know of its files.

    Attributes:
        seen: files and footers that were found sound.
        opening: held by the one that fetches, hashes and opens a file.
    """

    seen: set[object] = field(default_factory=set)
    opening: AbstractContextManager[object] = field(default_factory=threading.Lock)


class ShardReader:
    """Reads row groups; one per thread. `checked` is shared, so that a file is fetched and hashed once."""

    def __init__(self, store: Store, *, checked: CheckedFiles, verify: bool) -> None:
        self._store = store
        self._checked = checked
        self._verify = verify
        self._open: OpenFiles = OrderedDict()
        weakref.finalize(self, _close_all, self._open)

    def targets(
        self, shard: Shard, group: int, *, k: int | None = None, rank: int | None = None
    ) -> tuple[TokenRows, TargetArrays]:
        """The tokens of one row group.

        Raises:
            CorruptionError: the file is not the one that was committed, or a page is damaged.
        """
        ref = shard.record.targets
        lengths = shard.record.groups[group]
        _check_size(sum(lengths) * shard.codec.row_bytes, where=f"shards/{ref.name} row group {group}")
        table = self._table(ref, shard, group, shard.codec.schema, shard.codec.columns(rank=rank))
        where = f"shards/{ref.name} row group {group}"
        try:
            rows, targets = decode(table, shard.codec, k=k, rank=rank)
        except CorruptionError as error:
            raise CorruptionError(f"{where}: {error}; run 'pmetal-pipeline repair'") from error
        expected = np.repeat(np.array(shard.sequence_numbers(group), np.int32), lengths)
        if not np.array_equal(rows.sequences, expected):
            raise CorruptionError(
                f"{where}: sequence numbers must be those of its commit record, found others"
            )
        return rows, targets

    def hidden(self, shard: Shard, group: int, layers: tuple[int, ...]) -> Layers:
        """Hidden states of one row group, float32 [n, d] by layer.

        Raises:
            CorruptionError: as `targets`.
            IncompatibleError: a layer that is not stored.
        """
        ref, codec = shard.record.hidden, shard.hidden
        if ref is None or codec is None:
            raise CacheError(f"shard {shard.record.shard}: has no hidden states")
        rows = sum(shard.record.groups[group])
        _check_size(rows * codec.spec.row_bytes, where=f"shards/{ref.name} row group {group}")
        table = self._table(ref, shard, group, codec.schema, codec.columns(layers))
        try:
            return decode_hidden(table, codec, layers)
        except CorruptionError as error:
            raise CorruptionError(f"shards/{ref.name} row group {group}: {error}") from error

    def table(self, shard: Shard, group: int) -> pa.Table:
        """The stored columns of one row group.

        Raises:
            CorruptionError: as `targets`.
        """
        return self._table(shard.record.targets, shard, group, shard.codec.schema, shard.codec.columns())

    def metadata(self, ref: FileRef) -> pq.FileMetaData:
        """The footer of a file, after its hash was checked."""
        return self._file(ref).parquet.metadata

    def close(self) -> None:
        """Close all files."""
        _close_all(self._open)

    def _table(
        self, ref: FileRef, shard: Shard, group: int, schema: pa.Schema, columns: Sequence[str]
    ) -> pa.Table:
        file = self._file(ref)
        where = f"shards/{ref.name}"
        if not file.sound:
            check_footer(file.parquet, schema, shard.record.groups, where=where)
        wanted = {(group, name) for name in columns}
        for _, name in sorted(wanted - file.sound):
            _check_column(file, schema, group, name, where=where)
        file.sound.update(wanted)
        try:
            return file.parquet.read_row_group(group, columns=list(columns), use_threads=False)
        except _DAMAGE as error:
            raise CorruptionError(f"{where} row group {group}: must be readable, found {error}") from error

    def _file(self, ref: FileRef) -> OpenFile:
        if ref.name in self._open:
            self._open.move_to_end(ref.name)
            return self._open[ref.name]
        with self._checked.opening:
            file = self._opened_or_fetched_again(ref)
        self._open[ref.name] = file
        if len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].handle.close()
        return file

    def _opened_or_fetched_again(self, ref: FileRef) -> OpenFile:
        try:
            return self._opened(ref)
        except CorruptionError:
            if self._store.mirror is None:
                raise
            self._store.mirror.drop("shards", ref)
            return self._opened(ref)

    def _opened(self, ref: FileRef) -> OpenFile:
        self._store.fetch("shards", ref)
        check_folder(self._store.root / "shards")
        handle = open_plain(self._store.root / "shards" / ref.name)
        try:
            self._check_bytes(handle, ref)
            self._check_footer(handle, ref)
            return OpenFile(handle, open_parquet(handle, where=f"shards/{ref.name}"))
        except BaseException:
            handle.close()
            raise

    def _check_bytes(self, handle: BinaryIO, ref: FileRef) -> None:
        status = file_identity(handle)
        where, advice = f"shards/{ref.name}", "run 'pmetal-pipeline repair', then 'cache --resume'"
        if status[2] != ref.num_bytes:
            raise CorruptionError(f"{where}: must have {ref.num_bytes} bytes, found {status[2]}; {advice}")
        if not self._verify or (ref, status) in self._checked.seen:
            return
        digest = hash_stream(handle)
        if digest != ref.sha256:
            must = f"must have SHA-256 {ref.sha256[:16]}"
            raise CorruptionError(f"{where}: {must}, found {digest[:16]}; {advice}")
        self._checked.seen.add((ref, status))

    def _check_footer(self, handle: BinaryIO, ref: FileRef) -> None:
        key = ("footer", ref, file_identity(handle))
        if key not in self._checked.seen:
            check_structure(handle, where=f"shards/{ref.name}")
            self._checked.seen.add(key)


def _close_all(files: OpenFiles) -> None:
    while files:
        files.popitem()[1].handle.close()


def file_identity(handle: BinaryIO) -> tuple[int, int, int, int, int]:
    """Device, inode, size, modification and change time of an open file."""
    status = os.fstat(handle.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_parquet(handle: BinaryIO, *, where: str) -> pq.ParquetFile:
    """A Parquet file with page CRCs checked and its footer's sizes limited.

    `metadata.schema` is left alone: it and the metadata hold each other, and a reader of many shards would
    wait for the garbage collector to give up their footers.

    Raises:
        CorruptionError: not Parquet.
    """
    try:
        return pq.ParquetFile(
            handle,
            memory_map=False,
            pre_buffer=False,
            page_checksum_verification=True,
            thrift_string_size_limit=_THRIFT_LIMIT,
            thrift_container_size_limit=_THRIFT_LIMIT,
        )
    except _DAMAGE as error:
        raise CorruptionError(f"{where}: must be a Parquet file, found {error}") from error


def check_footer(
    file: pq.ParquetFile, schema: pa.Schema, groups: Sequence[Sequence[int]], *, where: str
) -> None:
    """Whether the footer promises the rows, columns and sizes that the commit record promises.

    Raises:
        CorruptionError: it does not; nothing was allocated for its pages yet.
    """
    meta = file.metadata
    if meta.num_row_groups != len(groups):
        raise CorruptionError(f"{where}: must have {len(groups)} row groups, found {meta.num_row_groups}")
    sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    if sizes != [sum(g) for g in groups]:
        must = f"row groups must have {[sum(g) for g in groups][:4]}... rows"
        raise CorruptionError(f"{where}: {must}, found {sizes[:4]}...")
    if not file.schema_arrow.remove_metadata().equals(schema):
        raise CorruptionError(
            f"{where}: columns must be {schema.names}, found {file.schema_arrow.names[:40]}"
        )
    for i, num_rows in enumerate(sizes):
        for j, kind in enumerate(schema.types):
            width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else 8
            claimed = meta.row_group(i).column(j).total_uncompressed_size
            if not 0 <= claimed <= num_rows * width + _SLACK_BYTES:
                must = f"row group {i} column {schema.names[j]} must unpack to {num_rows * width} bytes"
                raise CorruptionError(f"{where}: {must}, found {claimed}")


def _check_column(file: OpenFile, schema: pa.Schema, group: int, name: str, *, where: str) -> None:
    kind = schema.field(name).type
    width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else 0
    column = schema.get_field_index(name)
    try:
        check_pages(file.handle, file.parquet.metadata, group, column, width=width)
    except CorruptionError as error:
        raise CorruptionError(f"{where}: {error}") from error


def _check_size(num_bytes: int, *, where: str) -> None:
    if num_bytes > MAX_GROUP_BYTES:
        raise CorruptionError(f"{where}: must unpack to at most {MAX_GROUP_BYTES} bytes, found {num_bytes}")
