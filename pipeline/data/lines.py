"""JSON lines out of a plain or zstd-compressed file, streamed, with the number of every line.

Lines end at `\\n` only (a `\\r` before it is white space to JSON), so U+2028 inside a string does not split a
record. Blank lines are skipped; they count.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.documents import place
from schemas.errors import DataError

MAX_LINE_BYTES = 256 << 20
READ_BYTES = 1 << 20
# A zstd block of 4 bytes can stand for 128 KiB, so 2 KiB of input make at most 64 MiB of output.
ZSTD_READ_BYTES = 2 << 10
_BOM = b"\xef\xbb\xbf"


def read_json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yields (1-based line, value) of every line that is not blank.

    Raises:
        DataError: a line that is not UTF-8 or not JSON, or longer than `MAX_LINE_BYTES`; broken zstd data.
    """
    chunks = _zstd_chunks(file) if file.name.lower().endswith(".zst") else _plain_chunks(file)
    for line, data in enumerate(_split_lines(chunks, file), start=1):
        data = data.removeprefix(_BOM) if line == 1 else data
        if data.strip():
            yield line, _parse(data, place(str(file), line))


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: must be UTF-8, found byte 0x{data[error.start]:02x} at offset {error.start} of it; "
            "convert the file"
        ) from error
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
