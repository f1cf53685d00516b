"""JSON lines out of a plain, gzip- or zstd-compressed file, streamed, with the number of every line.

Lines end at `\\n` only (a `\\r` before it is white space to JSON), so U+2028 inside a string does not split a
record. Blank lines are skipped; they count.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.documents import place
from schemas.errors import DataError

MAX_LINE_BYTES = 256 << 20
MAX_WHOLE_BYTES = 512 << 20
READ_BYTES = 1 << 20
# A zstd block of 4 bytes can stand for 128 KiB, so 2 KiB of input make at most 64 MiB of output.
ZSTD_READ_BYTES = 2 << 10
_BOM = b"\xef\xbb\xbf"


def read_json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yields (1-based line, value) of every line that is not blank.

    Raises:
        DataError: a line that is not UTF-8 or not JSON, or longer than `MAX_LINE_BYTES`; broken compression.
    """
    for line, data in enumerate(read_lines(file), start=1):
        if data.strip():
            yield line, json_value(data, place(str(file), line))


def read_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file without their ends; the last one may be empty."""
    for number, data in enumerate(_split_lines(file_chunks(file), file)):
        yield data if number else without_bom(data)


def file_chunks(file: Path) -> Iterator[bytes]:
    """The content of a file in pieces of bounded size, decompressed as its name says.

    Raises:
        DataError: broken or truncated compression.
    """
    name = file.name.lower()
    if name.endswith(".zst"):
        return _zstd_chunks(file)
    return _gzip_chunks(file) if name.endswith(".gz") else _plain_chunks(file)


def read_whole(file: Path) -> bytes:
    """All of a file, decompressed as its name says.

    Raises:
        DataError: more than `MAX_WHOLE_BYTES`, or broken compression.
    """
    data = bytearray()
    for chunk in file_chunks(file):
        data += chunk
        if len(data) > MAX_WHOLE_BYTES:
            raise DataError(
                f"{file}: what is read as a whole must have at most {MAX_WHOLE_BYTES >> 20} MiB, found more; "
                "write one record a line into a .jsonl file"
            )
    return bytes(data)


def without_bom(data: bytes) -> bytes:
    """The same without a byte order mark."""
    return data.removeprefix(_BOM)


def decoded(data: bytes, where: str) -> str:
    """UTF-8 as text.

    Raises:
        DataError: it is not; with `where`.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: must be UTF-8, found byte 0x{data[error.start]:02x} at offset {error.start} of it; "
            "convert the file"
        ) from error


def json_value(data: bytes, where: str) -> Any:
    """What a JSON text says.

    Raises:
        DataError: it is none, or not UTF-8; with `where`.
    """
    text = decoded(data, where)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: must be one JSON object, found {error.msg} at column {error.colno}; correct the line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: must be one JSON object, found: {error}; correct the line") from error


def _split_lines(chunks: Iterator[bytes], file: Path) -> Iterator[bytes]:
    pending = bytearray()
    line = 1
    for chunk in chunks:
        pending += chunk
        if b"\n" in chunk:
            *complete, rest = bytes(pending).split(b"\n")
            pending = bytearray(rest)
            yield from complete
            line += len(complete)
        if len(pending) > MAX_LINE_BYTES:
            raise DataError(
                f"{place(str(file), line)}: a line must be at most {MAX_LINE_BYTES >> 20} MiB, found more; "
                "write one document a line"
            )
    yield bytes(pending)


def _plain_chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            yield chunk


def _gzip_chunks(file: Path) -> Iterator[bytes]:
    """Decompresses member after member, at most `READ_BYTES` at a time."""
    member = zlib.decompressobj(wbits=31)
    inside = False
    try:
        for data in _plain_chunks(file):
            rest = data
            while rest or member.unconsumed_tail:
                inside = True
                yield member.decompress(rest, READ_BYTES)
                rest = member.unconsumed_tail
                if member.eof:
                    rest, inside = member.unused_data, False
                    member = zlib.decompressobj(wbits=31)
    except zlib.error as error:
        raise DataError(f"{file}: must be gzip data, found: {error}; compress the file again") from error
    if inside:
        raise DataError(f"{file}: must be complete gzip data, found its end missing; copy the file again")


def _zstd_chunks(file: Path) -> Iterator[bytes]:
    """Decompresses frame after frame. `stream_reader` would take a truncated file for a complete one."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    inside = False
    try:
        for data in _small_chunks(file):
            rest = data
            while rest:
                inside = True
                yield frame.decompress(rest)
                rest = b""
                if frame.eof:
                    rest, inside = frame.unused_data, False
                    frame = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise DataError(f"{file}: must be zstd data, found: {error}; compress the file again") from error
    if inside:
        raise DataError(f"{file}: must be complete zstd data, found its end missing; copy the file again")


def _small_chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(ZSTD_READ_BYTES):
            yield chunk
