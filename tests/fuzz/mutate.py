"""Mutations that know the structure: they change a field, a length or a value and put checksums right again.

Shared by the property tests and, as custom mutators, by the coverage-guided fuzzer.
"""

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import zstandard

from schemas.manifest import seal
from tests.faults.forge import Parquet, Reader, repack, write_struct

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**40,
    2**63 - 1,
    -(2**63),
)
VALUES: tuple[Any, ...] = (
    *NUMBERS, 10**400, 0.0, -0.5, 1e308, 1e-320, None, True, False, "", "x" * 300, "\x1b[2J", "../x",
    "/etc/passwd", "none", "sketch", "0" * 64, [], {}, [[]], [1, 2], {"a": 1}, [[[[[[[[[[[]]]]]]]]]]],
)  # fmt: skip

_GGUF_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
SYNTAX = (
    "&a ", "*a", "*layers", "? ", "- ", ": ", "{", "}", "[", "]", ", ", "!!int ", "!!set ", "!!omap ",
    "!!str ", "!!binary ", "!!timestamp ", "!!pairs ", "!x ", "<<: *a\n", "<<: ", "|\n", ">-\n", "---\n",
    "...\n", "%YAML 1.1\n", "#", "'", '"', "\\x", "~", "1:2:3", "0x", "1e9999", ".inf", ".nan", "0b1",
    "2001-13-45", "2001-01-01", "=", "\n", "\t", "\x85", "\u2028", "\x00", "9" * 50, "a: &a [*a]\n",
    "x: &x {y: [1, 2]}\nz: [*x, *x, *x]\n",
)  # fmt: skip
MAX_PAGE_BYTES = 1 << 16

_CANNOT = (
    ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, StopIteration,
    struct.error, zstandard.ZstdError,
)  # fmt: skip


def mutated(target: str, data: bytes, draw: random.Random) -> bytes:
    """A mutant of an input of a target; the input itself, damaged, where it cannot be taken apart."""
    try:
        for _ in range(draw.choice((1, 1, 2, 4))):
            data = _MUTATORS[target](data, draw)
    except _CANNOT:
        return flipped(data, draw)
    return data


def flipped(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, taken away or doubled."""
    out = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 3))):
        at = draw.randrange(len(out) + 1)
        span = draw.choice((1, 1, 2, 4, 8, 32))
        action = draw.randrange(4)
        if action == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif action == 1:
            out[at : at + span] = draw.choice(NUMBERS).to_bytes(16, "little", signed=True)[:span]
        elif action == 2:
            del out[at : at + span]
        else:
            out[at:at] = out[at : at + span]
    return bytes(out)


def _json(data: bytes, draw: random.Random) -> bytes:
    raw = json.loads(data)
    raw.pop("checksum", None)
    _change(raw, draw)
    return seal(raw)


def _change(raw: Any, draw: random.Random) -> None:
    """Replaces, removes or adds one value somewhere in nested lists and objects."""
    places = list(_places(raw))
    holder, key = draw.choice(places)
    action = draw.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[draw.choice(("", "x", "shard", "\x00", "\ud7ff"))] = draw.choice(VALUES)
    elif action == 2 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += draw.choice((-1, 1))
    elif action == 3 and isinstance(holder, list):
        holder.append(draw.choice((holder[key], draw.choice(VALUES))))
    elif action == 4:
        other, name = draw.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    else:
        holder[key] = draw.choice(VALUES)


def _places(raw: Any) -> Any:
    items = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for key, value in list(items):
        yield raw, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def _yaml(data: bytes, draw: random.Random) -> bytes:
    """A piece of syntax put in somewhere, or a line moved."""
    text = data.decode("utf-8", "replace")
    if draw.random() < 0.3:
        lines = text.splitlines(keepends=True)
        lines.insert(
            draw.randrange(len(lines) + 1), "  " * draw.randrange(3) + draw.choice(lines).strip() + "\n"
        )
        return "".join(lines).encode()
    at = draw.randrange(len(text) + 1)
    if draw.random() < 0.5:
        at = max(text.find(": ", at) + 2, 0)
    return (text[:at] + draw.choice(SYNTAX) + text[at + draw.choice((0, 0, 1, 4)) :]).encode(
        "utf-8", "replace"
    )


def _gguf(data: bytes, draw: random.Random) -> bytes:
    """A count, length, type, size or offset of the header replaced, or a text."""
    start, stop, text = draw.choice(list(_gguf_places(data)))
    if text:
        return data[:start] + flipped(data[start:stop], draw) + data[stop:]
    before = int.from_bytes(data[start:stop], "little")
    value = draw.choice((*NUMBERS, before + 1, before - 1, before * 2, before + 32, 8, 9))
    return data[:start] + (value % (1 << 8 * (stop - start))).to_bytes(stop - start, "little") + data[stop:]


def _gguf_places(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Where the numbers (and texts) of a header lie."""
    at = 4

    def number(size: int) -> Iterator[tuple[int, int, bool]]:
        nonlocal at
        at += size
        if at > len(data):
            raise IndexError("a header that leaves the file")
        yield at - size, at, False

    def text() -> Iterator[tuple[int, int, bool]]:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        yield from number(8)
        at += length
        yield at - length, at, True

    def value(kind: int) -> Iterator[tuple[int, int, bool]]:
        if kind == 8:
            yield from text()
        elif kind == 9:
            kind, count = struct.unpack_from("<IQ", data, at)
            yield from (*number(4), *number(8))
            for _ in range(count):
                yield from value(kind)
        else:
            yield from number(_GGUF_BYTES[kind])

    tensors, keys = struct.unpack_from("<QQ", data, 8)
    yield from (*number(4), *number(8), *number(8))
    for _ in range(keys):
        yield from text()
        (kind,) = struct.unpack_from("<I", data, at)
        yield from number(4)
        yield from value(kind)
    for _ in range(tensors):
        yield from text()
        (dimensions,) = struct.unpack_from("<I", data, at)
        for size in (4, *[8] * min(dimensions, 8), 4, 8):
            yield from number(size)


def _sidecar(data: bytes, draw: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if draw.random() < 0.4:
        return data[: 8 + length] + flipped(body, draw)
    raw = json.loads(header)
    _change(raw, draw)
    text = json.dumps(raw).encode()
    size = len(text) if draw.random() < 0.9 else draw.choice(NUMBERS) % 2**64
    return struct.pack("<Q", size) + text + body


def _field(fields: dict[int, Any], draw: random.Random) -> None:
    """Changes one field of a Thrift structure, here or deeper."""
    number = draw.choice(list(fields))
    kind, value = fields[number]
    if kind == 12 and draw.random() < 0.8 and value:
        _field(value, draw)
        return
    if kind == 9 and draw.random() < 0.8 and value[1]:
        items, values = value
        at = draw.randrange(len(values))
        action = draw.randrange(8)
        if items == 12 and action:
            _field(values[at], draw)
        elif action < 3:
            del values[at]
        elif action < 5:
            values.append(values[at])
        else:
            values[at] = draw.choice(NUMBERS) if items in (4, 5, 6) else flipped(bytes(values[at]), draw)
        return
    action = draw.randrange(5)
    if action == 0:
        del fields[number]
    elif action == 1:
        fields[draw.randrange(-3, 40)] = (kind, value)
    elif kind in (4, 5, 6):
        fields[number] = (kind, draw.choice((*NUMBERS, value + 1, value - 1)))
    elif kind == 8:
        fields[number] = (8, draw.choice((flipped(value, draw), b"", b"ARROW:schema", b"id0", b"\xff")))


def _footer(data: bytes, draw: random.Random) -> bytes:
    fields = Reader(data).struct()
    _field(fields, draw)
    return write_struct(fields)


def _pages(data: bytes, draw: random.Random) -> bytes:
    reader = Reader(data)
    fields = reader.struct()
    _field(fields, draw)
    return write_struct(fields) + data[reader.at :]


def _shard(data: bytes, draw: random.Random) -> bytes:
    parquet = Parquet.parse(data)
    chunk = parquet.chunks[draw.choice(list(parquet.chunks))]
    action = draw.randrange(4)
    if action == 0:
        parquet.to_bytes()
        _field(parquet.footer, draw)
        return parquet.to_bytes(fix=False)
    if action == 1:
        _field(chunk.header, draw)
    elif action == 2:
        if zstandard.frame_content_size(chunk.data) > MAX_PAGE_BYTES:
            raise ValueError("a page that unpacks to too much")
        plain = zstandard.ZstdDecompressor().decompress(chunk.data, max_output_size=MAX_PAGE_BYTES)
        repack(chunk, flipped(plain, draw))
    else:
        chunk.data = flipped(chunk.data, draw)
        chunk.header[3] = (5, len(chunk.data))
    return parquet.to_bytes()


_MUTATORS = {
    "dataset": _json,
    "record": _json,
    "sidecar": _sidecar,
    "gguf": _gguf,
    "yaml": _yaml,
    "pages": _pages,
    "footer": _footer,
    "shard": _shard,
    "checkpoint": _sidecar,
}
