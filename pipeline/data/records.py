"""Records out of JSON lines, JSON and CSV, plain, gzip- or zstd-compressed, each with its place in the file.

JSON lines and CSV are streamed. A `.json` file is a list of records, one record, or JSON lines after all; it
is read whole, at about ten times its size.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.documents import place
from pipeline.data.lines import (
    MAX_LINE_BYTES,
    decoded,
    json_value,
    read_json_lines,
    read_lines,
    read_whole,
    without_bom,
)
from schemas.errors import DataError


def read_records(file: Path, suffix: str) -> Iterator[tuple[int, Any]]:
    """Yields (1-based line, value); of a list in a `.json` file, (1-based number in the list, value).

    Args:
        file: to read.
        suffix: its extension; what it says of compression does not count, the name does.

    Raises:
        DataError: what is no such file, or is too large.
    """
    if suffix.startswith(".csv"):
        return _csv(file)
    return _json(file) if suffix in (".json", ".json.gz") else read_json_lines(file)


def _json(file: Path) -> Iterator[tuple[int, Any]]:
    data = without_bom(read_whole(file))
    try:
        value = json.loads(data)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataError(
                f"{place(str(file), error.lineno)}: must be JSON, found {error.msg} at column {error.colno}; "
                "correct the file"
            ) from error
        yield from read_json_lines(file)
        return
    except (ValueError, RecursionError):
        value = json_value(data, str(file))  # raises with the reason
    yield from enumerate(value, start=1) if isinstance(value, list) else [(1, value)]


def _csv(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.reader(_text_lines(file), strict=True)
    names: list[str] = []
    before = 0
    try:
        for row in rows:
            line, before = before + 1, rows.line_num
            if not names:
                names = row
            elif row:
                yield line, _named(row, names, place(str(file), line))
    except csv.Error as error:
        raise DataError(
            f"{place(str(file), rows.line_num)}: must be CSV with commas, found: {error}; write it again"
        ) from error


def _named(row: list[str], names: list[str], where: str) -> dict[str, str]:
    if len(row) != len(names):
        raise DataError(
            f"{where}: a row must have {len(names)} fields, as the first line has {', '.join(names)}, found "
            f"{len(row)}; put fields with commas or line ends into double quotes"
        )
    return dict(zip(names, row, strict=True))


def _text_lines(file: Path) -> Iterator[str]:
    for line, data in enumerate(read_lines(file), start=1):
        yield decoded(data, place(str(file), line)) + "\n"
