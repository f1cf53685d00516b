"""What JSON lines of model servers have in common: files, the response in a line, rows of entries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.exchange.sequences import SourceSequence, ragged_heads
from schemas.arrays import Int32
from schemas.errors import DataError

LEAST_LOGPROB = -9999.0  # what vLLM's server writes for minus infinity
GAP = "entries of the text's own token, below the top"
UNMAPPED = "positions with a token string that stands for no single token"
SUFFIXES = (".jsonl", ".jsonl.zst")

Entry = tuple[int, float]


def json_files(source: Path) -> tuple[Path, ...]:
    """The `.jsonl` and `.jsonl.zst` files of a source, by name.

    Raises:
        DataError: there are none.
    """
    found = [source] if source.is_file() else sorted(source.rglob("*")) if source.is_dir() else []
    files = tuple(f for f in found if f.is_file() and f.name.lower().endswith(SUFFIXES))
    if not files:
        raise DataError(
            f"{source}: must be .jsonl or .jsonl.zst, or a folder of them, found none; check the path"
        )
    return files


def body_of(record: object, where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The response in a line (bare, or in a batch's `response.body`) and its only choice, or itself."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: must be a JSON object, found {type(record).__name__}; write one a line")
    response = record.get("response")
    body = response.get("body", response) if isinstance(response, Mapping) else record
    if not isinstance(body, Mapping):
        raise DataError(f"{where}: 'response' must be an object, found {type(body).__name__}")
    choices = body.get("choices")
    if choices is None:
        return body, body
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        found = len(choices) if isinstance(choices, list) else type(choices).__name__
        raise DataError(f"{where}: must have exactly one choice, found {found}; ask for n=1")
    return body, choices[0]


def sequence_of_rows(token_ids: Int32, rows: list[list[Entry]], where: str) -> SourceSequence:
    """A sequence of n tokens from the entries of its first n - 1 rows; nothing is known of the last."""
    heads = ragged_heads([*rows, []], where)
    return SourceSequence(where, token_ids, np.zeros_like(token_ids), heads.counts > 0, heads)


def without_gap(entries: list[Entry], own: int, *, longest: int) -> list[Entry]:
    """Entries without ranks, less the text's own token where it may stand far below the one before it.

    It is added to the top (or takes the place of its last) when it is not among them, so it may do so only
    where it is the least likely and the list is as long as lists get.

    Args:
        entries: of one position.
        own: the text's token there.
        longest: most entries of a position of this record.
    """
    if len(entries) == longest and min(entries, key=lambda entry: entry[1])[0] == own:
        return [entry for entry in entries if entry[0] != own]
    return entries


def is_logprob(value: Any) -> bool:
    """Whether a JSON value is a number that is not NaN and fits a float."""
    return (type(value) is float and value == value) or (type(value) is int and abs(value) < 1 << 24)
