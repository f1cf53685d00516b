"""The footer of a Parquet file, checked before Parquet's own library reads it.

That library allocates what a footer promises, skips what it does not know and takes a schema of its own from
it; some of its accessors end the process (pyarrow 26.0.1: `compression` of an unknown number). Here only what
the format allows is let through. Costs about 10 microseconds for each column of a row group.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

from pmetal_distill.offline.thrift import BINARY, I16, I32, I64, CompactReader, ListOf, Shape, Struct, Value
from schemas.errors import CorruptionError

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 1 << 26
MAX_COLUMNS = 1 << 12
_MAX_VALUE_BYTES = 1 << 20
_MAX_COLUMN_BYTES = 1 << 10
_MAX_TEXT_BYTES = 1 << 16
_VERSIONS = (1, 2)
_SCHEMA, _NUM_ROWS, _ROW_GROUPS, _TEXTS, _AUTHOR, _ORDERS = 2, 3, 4, 5, 6, 7
_BOOLEAN, _INT32, _BYTES, _REQUIRED, _ZSTD = 0, 1, 7, 0, 6
_ENCODINGS = {0, 3, 5}  # PLAIN, RLE (of levels, which flat columns do not have), DELTA_BINARY_PACKED

# All that may be there: no encryption, dictionaries, statistics, filters, other files, sorting or nesting.
_ELEMENT: Shape = {1: I32, 2: I32, 3: I32, 4: BINARY, 5: I32, 9: I32}
_COLUMN: Shape = {
    1: I32, 2: ListOf(I32), 3: ListOf(BINARY), 4: I32, 5: I64, 6: I64, 7: I64, 9: I64,
    13: ListOf({1: I32, 2: I32, 3: I32}),
}  # fmt: skip
_GROUP: Shape = {1: ListOf({2: I64, 3: _COLUMN}), 2: I64, 3: I64, 5: I64, 6: I64, 7: I16}
_FOOTER: Shape = {
    1: I32,
    _SCHEMA: ListOf(_ELEMENT),
    _NUM_ROWS: I64,
    _TEXTS: ListOf({1: BINARY, 2: BINARY}),
    _AUTHOR: BINARY,
    _ORDERS: ListOf({1: {}}),
}
_STRUCT = 12


@dataclass(frozen=True, slots=True)
class _Column:
    """A leaf of the schema: its name and Parquet's number of its type."""

    name: bytes
    kind: int


def check_structure(handle: BinaryIO, *, where: str) -> None:
    """Whether the footer is one that the format allows and describes chunks inside the file.

    Names, types and row counts may still be others than wanted.

    Raises:
        CorruptionError: it is not.
    """
    try:
        footer, end = _read(handle)
        _check(footer, end)
    except (ValueError, IndexError, KeyError) as error:
        raise CorruptionError(f"{where}: must be Parquet as the format allows it, found {error!r}") from error


def _read(handle: BinaryIO) -> tuple[bytes, int]:
    """The footer's bytes and where they begin."""
    size = handle.seek(0, 2)
    if size < 16:
        raise ValueError(f"{size} bytes")
    handle.seek(0)
    first = handle.read(4)
    handle.seek(size - 8)
    length, last = struct.unpack("<I4s", handle.read(8))
    if first != MAGIC or last != MAGIC:
        raise ValueError("another magic number")
    if not 0 < length <= min(MAX_FOOTER_BYTES, size - 12):
        raise ValueError(f"a footer of {length} bytes")
    handle.seek(size - 8 - length)
    return handle.read(length), size - 8 - length


def _check(footer: bytes, end: int) -> None:
    columns: list[_Column] = []
    fields: Struct = {}
    at = number = rows = 0
    while True:
        reader = CompactReader(footer[at : at + _MAX_VALUE_BYTES])
        field = reader.field(number)
        if field is None:
            break
        number, kind = field
        if number in fields:
            raise ValueError(f"field {number} twice")
        if number == _ROW_GROUPS:
            fields[number] = reader.list_head(kind, _STRUCT)
            at, rows = _check_groups(footer, at + reader.at, _integer(fields[number]), columns, end)
        elif number in _FOOTER:
            fields[number] = reader.value(kind, _FOOTER[number])
            at += reader.at
            if number == _SCHEMA:
                columns = _columns(_list(fields[_SCHEMA]))
        else:
            raise ValueError(f"field {number}")
    if at + reader.at != len(footer):
        raise ValueError(f"{len(footer) - at - reader.at} bytes behind the footer")
    _check_fields(fields, len(columns), rows)


def _check_fields(fields: Struct, num_columns: int, rows: int) -> None:
    if fields[1] not in _VERSIONS or fields[_NUM_ROWS] != rows or _ROW_GROUPS not in fields:
        raise ValueError(f"version {fields[1]!r} and {fields[_NUM_ROWS]!r} rows, {rows} in row groups")
    for pair in map(_struct, _list(fields.get(_TEXTS, []))):
        if _text(pair[1]).startswith("ARROW"):
            raise ValueError("a schema of its own")
        _text(pair.get(2, b""))
    _text(fields.get(_AUTHOR, b""))
    if _ORDERS in fields and fields[_ORDERS] != [{1: {}}] * num_columns:
        raise ValueError("other column orders")


def _columns(elements: list[Value]) -> list[_Column]:
    root = _struct(elements[0])
    if (
        not root.keys() <= {3, 4, 5}
        or root[5] != len(elements) - 1
        or not 1 < len(elements) <= MAX_COLUMNS + 1
    ):
        raise ValueError(f"a schema of {len(elements) - 1} columns")
    _text(root[4])
    columns: list[_Column] = []
    for element in map(_struct, elements[1:]):
        kind, name = _integer(element[1]), element[4]
        if 5 in element or element[3] != _REQUIRED:
            raise ValueError("a column that is nested or may be null")
        if kind not in (_BOOLEAN, _INT32, _BYTES):
            raise ValueError(f"a column of type {kind}")
        if kind == _BYTES and not 0 < _integer(element[2]) < 1 << 24:
            raise ValueError(f"a column of width {element[2]!r}")
        if not isinstance(name, bytes) or not name.isascii() or name in {column.name for column in columns}:
            raise ValueError(f"a column {name!r}")
        columns.append(_Column(name, kind))
    return columns


def _check_groups(footer: bytes, at: int, size: int, columns: list[_Column], end: int) -> tuple[int, int]:
    """Checks the row groups at `at`; where they end, and their rows."""
    total = 0
    for _ in range(size):
        reader = CompactReader(footer[at : at + _MAX_COLUMN_BYTES * (len(columns) + 1)])
        group = reader.struct(_GROUP)
        at += reader.at
        chunks, rows = _list(group[1]), _integer(group[3])
        if len(chunks) != len(columns) or 2 not in group or not 0 < rows < 1 << 31:
            raise ValueError(f"a row group of {len(chunks)} columns and {rows} rows")
        for chunk, column in zip(chunks, columns, strict=True):
            _check_chunk(_struct(chunk), column, rows, end)
        total += rows
    return at, total


def _check_chunk(chunk: Struct, column: _Column, rows: int, end: int) -> None:
    meta = _struct(chunk[3])
    if (
        meta[1] != column.kind
        or meta[3] != [column.name]
        or meta[4] != _ZSTD
        or meta[5] != rows
        or 2 not in chunk
    ):
        raise ValueError(f"column {column.name!r} of another type, name, compression or number of rows")
    if not set(map(_integer, _list(meta[2]))) <= _ENCODINGS:
        raise ValueError(f"column {column.name!r} encoded as {meta[2]!r}")
    for statistics in map(_struct, _list(meta.get(13, []))):
        if statistics.keys() != {1, 2, 3}:
            raise ValueError(f"column {column.name!r} with pages {statistics!r}")
    unpacked, packed, start = _integer(meta[6]), _integer(meta[7]), _integer(meta[9])
    if min(unpacked, packed) <= 0 or start < len(MAGIC) or start + packed > end:
        raise ValueError(f"column {column.name!r} from byte {start}, {packed} bytes, unpacked {unpacked}")


def _struct(value: Value) -> Struct:
    assert isinstance(value, dict)
    return value


def _list(value: Value) -> list[Value]:
    assert isinstance(value, list)
    return value


def _integer(value: Value) -> int:
    assert isinstance(value, int)
    return value


def _text(value: Value) -> str:
    assert isinstance(value, bytes)
    if len(value) > _MAX_TEXT_BYTES:
        raise ValueError(f"a text of {len(value)} bytes")
    return value.decode("utf-8")
