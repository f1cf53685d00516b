"""Packs tokenized documents into sequences of a bounded length, several to a sequence.

A document longer than `max_seq_len` is cut into windows of exactly that length and a rest; each window
fills a sequence of its own, so two windows of one document never share one. Short documents and rests go
into the open sequence they fit best; at most `open_bins` stay open. One pass, the same result on every run.

Cost: 4 bytes a token, 17 a window, 16 a prompt after an answer, 8 a sequence and 12 a document, of which
`spool.MEMORY_BYTES` of each kind stay in memory and the rest in unnamed files (100 GB of text, 30e9 tokens:
125 GB of files and 0.3 GB of memory); 2 us a window. A window after a cut starts without the context before
it. Packing reorders: sequences stand in the order in which they filled.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.documents import place
from pipeline.data.packed import PackedDataset, PackedSequence, PackSettings
from pipeline.data.spool import Column
from pipeline.data.tokenizing import TokenizedDocument
from schemas.errors import DataError

__all__ = ["PackSettings", "PackedDataset", "PackedSequence", "pack"]

_ROWS_AT_ONCE = 4096


class _Window(NamedTuple):
    token_ids: bytes  # int32, a copy: a view would keep its whole document
    size: int
    document: int
    masked: int  # first positions whose next token is prompt
    ends_document: bool
    gaps: list[tuple[int, int]]  # further such positions, first and after the last


def pack(
    documents: Iterable[TokenizedDocument],
    settings: PackSettings,
    *,
    spool_folder: Path | None = None,
    memory_bytes: int | None = None,
) -> PackedDataset:
    """Packs a stream of documents.

    Args:
        documents: the stream, read once; at least one document.
        settings: sequence length and how to pack.
        spool_folder: where what does not stay in memory goes, in unnamed files that are memory-mapped; the
            system's folder for such files ($TMPDIR) if None.
        memory_bytes: most that stays in memory of the tokens and of every other column; `spool.MEMORY_BYTES`
            if None.

    Raises:
        DataError: no document, or none with two tokens, so that nothing could be trained on; no room in
            `spool_folder`.
    """
    with ExitStack() as stack:

        def column(dtype: type[Any]) -> "Column[Any]":
            return stack.enter_context(Column(dtype, folder=spool_folder, memory_bytes=memory_bytes))

        builder = _Builder(column)
        bins = _OpenBins(settings)
        for document in documents:
            for window in _windows(document, builder.add_document(document), settings.max_seq_len):
                for full in bins.put(window):
                    builder.add_sequence(full)
        for rest in bins.rest():
            builder.add_sequence(rest)
        return builder.finish(settings)


def _windows(document: TokenizedDocument, number: int, max_seq_len: int) -> Iterator[_Window]:
    length = len(document.token_ids)
    if not length:
        raise DataError(f"{place(document.source, document.line)}: must have tokens, found none; remove it")
    token_ids = np.asarray(document.token_ids, np.int32)
    for start in range(0, length, max_seq_len):
        size = min(max_seq_len, length - start)
        yield _Window(
            token_ids=token_ids[start : start + size].tobytes(),
            size=size,
            document=number,
            # Position t predicts token t + 1, so the last prompt position is trained: it predicts the answer.
            masked=min(max(document.prompt_length - 1 - start, 0), size),
            ends_document=start + size == length,
            gaps=_gaps(document, start, size),
        )


def _gaps(document: TokenizedDocument, start: int, size: int) -> list[tuple[int, int]]:
    """Positions of a window, after its first ones, whose next token is prompt."""
    moved = ((first - 1 - start, stop - 1 - start) for first, stop in document.gaps)
    return [(max(first, 0), min(stop, size)) for first, stop in moved if first < size and stop > 0]


class _OpenBins:
    """Sequences that still have room."""

    def __init__(self, settings: PackSettings) -> None:
        self._settings = settings
        # (room, number), ascending: the tightest first, of equal ones the one that was opened first.
        self._order: list[tuple[int, int]] = []
        self._bins: dict[int, list[_Window]] = {}
        self._opened = 0

    def put(self, window: _Window) -> list[list[_Window]]:
        """Puts a window into the open bin with the least room that suffices; returns what this closes."""
        order, closed = self._order, []
        best = bisect_left(order, (window.size, -1))
        if best < len(order):
            room, number = order.pop(best)
        else:
            if len(order) >= self._settings.open_bins:
                closed.append(self._bins.pop(order.pop(0)[1]))
            room, number = self._settings.max_seq_len, self._opened
            self._opened += 1
            self._bins[number] = []
        self._bins[number].append(window)
        room -= window.size
        if room and self._settings.pack:
            insort(order, (room, number))
        else:
            closed.append(self._bins.pop(number))
        return closed

    def rest(self) -> Iterable[list[_Window]]:
        """The bins that are still open, in the order in which they were opened."""
        return self._bins.values()


class _Builder:
    """Collects closed bins into flat columns."""

    def __init__(self, column: "Callable[[type[Any]], Column[Any]]") -> None:
        self._num_tokens = self._num_targets = 0
        self._num_windows = self._num_documents = 0
        self._tokens = column(np.int32)
        # What is not yet in a column, as rows that Python appends fastest to.
        self._rows = {name: (array(code), column(dtype)) for name, code, dtype in _COLUMNS}
        self._row = {name: rows for name, (rows, _) in self._rows.items()}
        self._row["sequence_windows"].append(0)
        self._row["window_tokens"].append(0)
        self._source_numbers: dict[str, int] = {}

    def add_document(self, document: TokenizedDocument) -> int:
        """Numbers the document, in the order of reading."""
        source = self._source_numbers.setdefault(document.source, len(self._source_numbers))
        self._row["document_sources"].append(source)
        self._row["document_lines"].append(document.line)
        self._num_documents += 1
        if self._num_documents % _ROWS_AT_ONCE == 0:
            self._flush()
        return self._num_documents - 1

    def add_sequence(self, closed: list[_Window]) -> None:
        row = self._row
        for number, (token_ids, size, document, masked, ends_document, gaps) in enumerate(closed):
            self._tokens.write(token_ids)
            self._num_tokens += size
            for first, stop in gaps:
                row["gap_windows"].append(self._num_windows + number)
                row["gap_starts"].append(first)
                row["gap_stops"].append(stop)
                self._num_targets -= stop - first
            # The last token of a document has nothing to predict.
            self._num_targets += size - masked - (ends_document and masked < size)
            row["window_tokens"].append(self._num_tokens)
            row["window_documents"].append(document)
            row["window_masked"].append(masked)
            row["window_ends"].append(ends_document)
        self._num_windows += len(closed)
        row["sequence_windows"].append(self._num_windows)
        if len(row["window_ends"]) >= _ROWS_AT_ONCE:
            self._flush()

    def finish(self, settings: PackSettings) -> PackedDataset:
        if not self._num_tokens:
            raise DataError("data: must hold at least one document, found none; give other data")
        if not self._num_targets:
            raise DataError(
                f"data: must leave at least one position to train on, found {self._num_tokens} tokens, all "
                "prompt or the last of their document; give longer documents"
            )
        self._flush()
        columns = {name: column.finish() for name, (_, column) in self._rows.items()}
        return PackedDataset(
            settings=settings,
            token_ids=self._tokens.finish(),
            num_targets=self._num_targets,
            sources=tuple(self._source_numbers),
            **columns,
        )

    def _flush(self) -> None:
        for rows, column in self._rows.values():
            column.write(rows.tobytes())
            del rows[:]


# Name, code of Python's array and type of what `PackedDataset` keeps.
_COLUMNS: tuple[tuple[str, str, type[np.generic]], ...] = (
    ("sequence_windows", "q", np.int64),
    ("window_tokens", "q", np.int64),
    ("window_documents", "i", np.int32),
    ("window_masked", "i", np.int32),
    ("window_ends", "b", np.bool_),
    ("gap_windows", "q", np.int64),
    ("gap_starts", "i", np.int32),
    ("gap_stops", "i", np.int32),
    ("document_sources", "i", np.int32),
    ("document_lines", "q", np.int64),
)
