"""What every importer makes of its files: sequences of tokens, each with what the teacher said, row by row.

Row t of a sequence is about the token after token t, as everywhere in this project.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.arrays import Bool, Float32, Int32
from schemas.errors import DataError

MAX_TOKENS = 1 << 20
MAX_ENTRIES = 4096
MAX_ID = (1 << 31) - 1
ABSENT = np.float32(-np.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """The most likely tokens of each row.

    Attributes:
        ids: int32 [n, w].
        logprobs: float32 [n, w], natural log at T=1, descending; -inf where a row has fewer than w entries.
    """

    ids: Int32
    logprobs: Float32

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Entries of each row, int64 [n]."""
        return np.asarray((self.logprobs > ABSENT).sum(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """All logits of each row, left on disk until they are asked for.

    Attributes:
        rows: row numbers -> float32 [n, V].
        vocab_size: V.
    """

    rows: Callable[[npt.NDArray[np.int64]], Float32]
    vocab_size: int


@dataclass(frozen=True, slots=True, eq=False)
class SourceSequence:
    """One sequence of n tokens.

    Attributes:
        where: file and line, for messages.
        token_ids: int32 [n].
        documents: int32 [n], from 0; attention stayed inside them.
        loss_mask: bool [n], rows with something to learn from.
        said: what the teacher said; rows outside the mask mean nothing.
    """

    where: str
    token_ids: Int32
    documents: Int32
    loss_mask: Bool
    said: Heads | Logits


@dataclass(slots=True, eq=False)
class Source:
    """An opened source; subclasses read one format.

    Attributes:
        files: all that is read, for the fingerprint.
        mass_known: log-probabilities are over the whole vocabulary, so what they lack of one is the tail's.
        tolerance: how far probabilities may sum above one.
        vocab_size: V, where the format says it.
        dropped: what the last pass left out, counted by reason.
    """

    files: tuple[Path, ...]
    mass_known: bool = True
    tolerance: float = 1e-3
    vocab_size: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)

    def sequences(self) -> Iterator[SourceSequence]:
        """All sequences in a fixed order; may be called again."""
        raise NotImplementedError


def sorted_heads(ids: npt.ArrayLike, logprobs: npt.ArrayLike, where: str) -> Heads:
    """Heads in the order of the format: by falling log-probability, ties by lower id.

    Args:
        ids, logprobs: [n, w]; absent entries are -inf.
        where: for messages.

    Raises:
        DataError: NaN, plus infinity, or a token twice in a row.
    """
    tokens, values = np.asarray(ids, np.int64), np.asarray(logprobs, np.float64)
    bad = np.isnan(values) | (values == np.inf)
    if bad.any():
        row = int(bad.any(axis=1).argmax())
        raise DataError(
            f"{where} row {row}: log-probabilities must be numbers, found {values[row][bad[row]][0]}; "
            "leave the sequence out"
        )
    order = np.lexsort((tokens, -values), axis=1)
    tokens, values = np.take_along_axis(tokens, order, 1), np.take_along_axis(values, order, 1)
    present = np.where(values > ABSENT, tokens, -1 - np.arange(tokens.shape[1]))
    ordered = np.sort(present, axis=1)
    twice = (np.diff(ordered, axis=1) == 0).any(axis=1)
    if twice.any():
        raise DataError(
            f"{where} row {int(twice.argmax())}: each token must be listed once, found one twice; "
            "leave the sequence out"
        )
    return Heads(np.where(values > ABSENT, tokens, 0).astype(np.int32), values.astype(np.float32))


def ragged_heads(rows: Sequence[Sequence[tuple[int, float]]], where: str) -> Heads:
    """Heads of rows of (token id, log-probability), in any order."""
    width = max((len(row) for row in rows), default=0)
    if width > MAX_ENTRIES:
        raise DataError(
            f"{where}: a position must have at most {MAX_ENTRIES} entries, found {width}; ask for fewer"
        )
    ids = np.zeros((len(rows), width), np.int64)
    logprobs = np.full((len(rows), width), -np.inf)
    for i, row in enumerate(rows):
        if row:
            ids[i, : len(row)], logprobs[i, : len(row)] = zip(*row, strict=True)
    return sorted_heads(ids, logprobs, where)


def token_array(values: Any, where: str, what: str = "token ids") -> Int32:
    """int32 [n] of a JSON list or an integer array.

    Raises:
        DataError: not a flat list of integers from 0, empty or too long.
    """
    if not isinstance(values, np.ndarray) and not _all_whole(values):
        raise DataError(f"{where}: {what} must be a list of integers, found {_shown(values)}; write them")
    array = np.asarray(values)
    if array.ndim != 1 or not 1 <= len(array) <= MAX_TOKENS or array.dtype.kind not in "iu":
        found = f"{array.dtype} {list(array.shape)}"
        raise DataError(f"{where}: {what} must be 1 to {MAX_TOKENS} integers in a row, found {found}")
    low, high = array.min(), array.max()
    if low < 0 or high > MAX_ID:
        raise DataError(f"{where}: {what} must be from 0 to {MAX_ID}, found {low} to {high}")
    return array.astype(np.int32)


def _all_whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
