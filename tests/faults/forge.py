"""Files of a cache as a stranger may make them: every hash agrees, what they say does not.

A file is taken apart into fields that know how Thrift writes them, so a test changes one and puts it together
again. Kinds are Thrift's: 5 and 6 integers, 8 bytes, 9 a list, 12 a structure, 1 and 2 truth values.
"""

import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pmetal_distill.offline.store import Store
from schemas.manifest import FileRef, hashed_name

Fields = dict[int, tuple[int, Any]]


def varint(value: int) -> bytes:
    """Seven bits a byte, low ones first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def signed(value: int) -> bytes:
    """Zigzag."""
    return varint((value << 1) ^ (value >> 63))


def write_value(kind: int, value: Any) -> bytes:
    """One value."""
    if kind in (4, 5, 6):
        return signed(value)
    if kind == 8:
        return varint(len(value)) + value
    if kind == 12:
        return write_struct(value)
    if kind == 9:
        items, values = value
        head = (
            bytes([len(values) << 4 | items])
            if len(values) < 15
            else bytes([0xF0 | items]) + varint(len(values))
        )
        return head + b"".join(write_value(items, v) for v in values)
    return b""


def write_struct(fields: Fields) -> bytes:
    """A structure, fields in the order of their numbers."""
    out, before = b"", 0
    for number, (kind, value) in sorted(fields.items()):
        step = number - before
        out += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + signed(number)
        out += write_value(kind, value)
        before = number
    return out + b"\0"


class Reader:
    """Reads what `write_struct` writes, keeping the kinds."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def value(self, kind: int) -> Any:
        if kind in (4, 5, 6):
            value = self.varint()
            return (value >> 1) ^ -(value & 1)
        if kind == 8:
            size = self.varint()
            self.at += size
            return self.data[self.at - size : self.at]
        if kind == 12:
            return self.struct()
        if kind == 9:
            head = self.byte()
            size = head >> 4 if head >> 4 < 15 else self.varint()
            if size > len(self.data):
                raise ValueError(f"a list of {size} items")
            return head & 15, [self.value(head & 15) for _ in range(size)]
        return kind == 1

    def struct(self) -> Fields:
        fields: Fields = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.value(5)
            fields[number] = (head & 15, self.value(head & 15))
        return fields


@dataclasses.dataclass
class Chunk:
    """A column of a row group: the header and the packed data of its only page."""

    header: Fields
    data: bytes


@dataclasses.dataclass
class Parquet:
    """A Parquet file in parts; `chunks` by row group and column name."""

    footer: Fields
    chunks: dict[tuple[int, str], Chunk]

    @staticmethod
    def parse(data: bytes) -> "Parquet":
        (length,) = struct.unpack("<I", data[-8:-4])
        footer = Reader(data[-8 - length : -8]).struct()
        chunks = {}
        for number, group in enumerate(footer[4][1][1]):
            for column in group[1][1][1]:
                meta = column[3][1]
                start, size = meta[9][1], meta[7][1]
                page = Reader(data[start : start + size])
                header = page.struct()
                chunks[number, meta[3][1][1][0].decode()] = Chunk(header, page.data[page.at :])
        return Parquet(footer, chunks)

    def meta(self, group: int, name: str) -> Fields:
        """ColumnMetaData of a chunk."""
        columns = self.footer[4][1][1][group][1][1][1]
        return next(c[3][1] for c in columns if c[3][1][3][1][1] == [name.encode()])

    def column(self, group: int, name: str) -> Fields:
        """ColumnChunk of a chunk."""
        columns = self.footer[4][1][1][group][1][1][1]
        return next(c for c in columns if c[3][1][3][1][1] == [name.encode()])

    def to_bytes(self, *, fix: bool = True) -> bytes:
        """The file; `fix` puts offsets and sizes of chunks right in the footer."""
        out = b"PAR1"
        for (group, name), chunk in self.chunks.items():
            page = write_struct(chunk.header) + chunk.data
            if fix:
                meta = self.meta(group, name)
                meta[9], meta[7] = (6, len(out)), (6, len(page))
            out += page
        footer = write_struct(self.footer)
        return out + footer + struct.pack("<I", len(footer)) + b"PAR1"


def repack(chunk: Chunk, plain: bytes) -> None:
    """Other content of a page, with sizes and checksum that agree."""
    import zstandard

    chunk.data = zstandard.ZstdCompressor(level=1).compress(plain)
    chunk.header[2], chunk.header[3] = (5, len(plain)), (5, len(chunk.data))
    crc = zlib.crc32(chunk.data)
    chunk.header[4] = (5, crc - (1 << 32) if crc >> 31 else crc)


def forge_shard(folder: Path, change: Callable[[Parquet], bytes | None], *, family: str = "targets") -> str:
    """Changes a file of shard 0 and the record that vouches for it; the file's new name."""
    store = Store.open(folder)
    record = store.record(0)
    old: FileRef = getattr(record, family)
    parquet = Parquet.parse((folder / "shards" / old.name).read_bytes())
    made = change(parquet)
    return place(folder, family, parquet.to_bytes() if made is None else made)


def place(folder: Path, family: str, data: bytes, *, claim: int | None = None) -> str:
    """Puts a file of shard 0 in place, with its record; `claim` is the size that the record gives."""
    store = Store.open(folder)
    record = store.record(0)
    sha256 = hashlib.sha256(data).hexdigest()
    directory, stem, suffix = {
        "targets": ("shards", "targets-00000", ".parquet"),
        "hidden": ("shards", "hidden-00000", ".parquet"),
        "basis": ("bases", "basis", ".safetensors"),
        "codebook": ("bases", "codebook", ".safetensors"),
        "hidden_basis": ("bases", "hidden_basis", ".safetensors"),
    }[family]
    ref = FileRef(hashed_name(stem, sha256, suffix), len(data) if claim is None else claim, sha256)
    (folder / directory / ref.name).write_bytes(data)
    store.record_path(0).write_bytes(dataclasses.replace(record, **{family: ref}).to_bytes())
    return f"{directory}/{ref.name}"
