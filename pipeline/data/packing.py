"""Packs tokenized documents into sequences of a bounded length, several to a sequence.

A document longer than `max_seq_len` is cut into windows of exactly that length and a rest; each window
fills a sequence of its own, so two windows of one document never share one. Short documents and rests go
into the open sequence they fit best; at most `open_bins` stay open. One pass, the same result on every run.

Cost: 4 bytes a token (none in memory with a spool folder), 17 a window, 12 a document; a window after a cut
starts without the context before it. Packing reorders: sequences stand in the order in
which they filled.
"""

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.documents import place
from pipeline.data.packed import PackedDataset, PackedSequence, PackSettings
from pipeline.data.tokenizing import TokenizedDocument
from schemas.errors import DataError

__all__ = ["PackSettings", "PackedDataset", "PackedSequence", "pack"]


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    token_ids: NDArray[np.int32]
    document: int
    masked: int  # first positions whose next token is prompt
    ends_document: bool


@dataclass(slots=True, eq=False)
class _Bin:
    room: int
    windows: list[_Window] = field(default_factory=list)

    def put(self, window: _Window) -> None:
        self.windows.append(window)
        self.room -= len(window.token_ids)


class _Sink(Protocol):
    def write(self, token_ids: NDArray[np.int32]) -> None: ...

    def finish(self) -> NDArray[np.int32]: ...

    def close(self) -> None: ...


def pack(
    documents: Iterable[TokenizedDocument], settings: PackSettings, *, spool_folder: Path | None = None
) -> PackedDataset:
    """Packs a stream of documents.

    Args:
        documents: the stream, read once; at least one document.
        settings: sequence length and how to pack.
        spool_folder: keep the tokens in an unnamed file there, memory-mapped, instead of in memory.

    Raises:
        DataError: no document, or none with two tokens, so that nothing could be trained on.
    """
    with closing(_FileSink(spool_folder) if spool_folder else _MemorySink()) as sink:
        builder = _Builder(sink)
        bins: list[_Bin] = []
        for document in documents:
            for window in _windows(document, builder.add_document(document), settings.max_seq_len):
                for full in _place(window, bins, settings):
                    builder.add_sequence(full)
        for rest in bins:
            builder.add_sequence(rest)
        return builder.finish(settings)


def _windows(document: TokenizedDocument, number: int, max_seq_len: int) -> Iterator[_Window]:
    length = len(document.token_ids)
    if not length:
        raise DataError(f"{place(document.source, document.line)}: must have tokens, found none; remove it")
    for start in range(0, length, max_seq_len):
        token_ids = document.token_ids[start : start + max_seq_len].copy()
        yield _Window(
            token_ids=token_ids,
            document=number,
            # Position t predicts token t + 1, so the last prompt position is trained: it predicts the answer.
            masked=min(max(document.prompt_length - 1 - start, 0), len(token_ids)),
            ends_document=start + max_seq_len >= length,
        )


def _place(window: _Window, bins: list[_Bin], settings: PackSettings) -> Iterator[_Bin]:
    """Puts a window into the open bin with the least room that suffices; yields the bins that this closes."""
    length = len(window.token_ids)
    fitting = [candidate for candidate in bins if candidate.room >= length]
    best = min(fitting, key=_room, default=None)
    if best is None:
        if len(bins) >= settings.open_bins:
            fullest = min(bins, key=_room)
            bins.remove(fullest)
            yield fullest
        best = _Bin(room=settings.max_seq_len)
        bins.append(best)
    best.put(window)
    if best.room == 0 or not settings.pack:
        bins.remove(best)
        yield best


def _room(candidate: _Bin) -> int:
    return candidate.room


class _Builder:
    """Collects closed bins into flat arrays."""

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        self._num_tokens = 0
        self._sequence_windows = array("q", [0])
        self._window_tokens = array("q", [0])
        self._window_documents = array("i")
        self._window_masked = array("i")
        self._window_ends = array("b")
        self._document_sources = array("i")
        self._document_lines = array("q")
        self._source_numbers: dict[str, int] = {}

    def add_document(self, document: TokenizedDocument) -> int:
        """Numbers the document, in the order of reading."""
        number = len(self._document_sources)
        source = self._source_numbers.setdefault(document.source, len(self._source_numbers))
        self._document_sources.append(source)
        self._document_lines.append(document.line)
        return number

    def add_sequence(self, closed: _Bin) -> None:
        for window in closed.windows:
            self._sink.write(window.token_ids)
            self._num_tokens += len(window.token_ids)
            self._window_tokens.append(self._num_tokens)
            self._window_documents.append(window.document)
            self._window_masked.append(window.masked)
            self._window_ends.append(window.ends_document)
        self._sequence_windows.append(len(self._window_documents))

    def finish(self, settings: PackSettings) -> PackedDataset:
        if not self._num_tokens:
            raise DataError("data: must hold at least one document, found none; give other data")
        dataset = PackedDataset(
            settings=settings,
            token_ids=self._sink.finish(),
            sequence_windows=np.array(self._sequence_windows, dtype=np.int64),
            window_tokens=np.array(self._window_tokens, dtype=np.int64),
            window_documents=np.array(self._window_documents, dtype=np.int32),
            window_masked=np.array(self._window_masked, dtype=np.int32),
            window_ends=np.array(self._window_ends, dtype=np.bool_),
            sources=tuple(self._source_numbers),
            document_sources=np.array(self._document_sources, dtype=np.int32),
            document_lines=np.array(self._document_lines, dtype=np.int64),
        )
        if not dataset.num_targets:
            raise DataError(
                f"data: must leave at least one position to train on, found {dataset.num_tokens} tokens, all "
                "prompt or the last of their document; give longer documents"
            )
        return dataset


class _MemorySink:
    def __init__(self) -> None:
        self._tokens = array("i")

    def write(self, token_ids: NDArray[np.int32]) -> None:
        self._tokens.frombytes(np.ascontiguousarray(token_ids).tobytes())

    def finish(self) -> NDArray[np.int32]:
        return np.frombuffer(self._tokens, dtype=np.int32)

    def close(self) -> None:
        pass


class _FileSink:
    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix="tokens-")  # noqa: SIM115

    def write(self, token_ids: NDArray[np.int32]) -> None:
        self._file.write(np.ascontiguousarray(token_ids).tobytes())

    def finish(self) -> NDArray[np.int32]:
        self._file.flush()
        return np.memmap(self._file, dtype=np.int32, mode="r")

    def close(self) -> None:
        self._file.close()  # the map, if there is one, holds the file open by itself
