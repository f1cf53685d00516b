"""Packed sequences as flat arrays, and what is asked of them: a sequence, its mask, the fingerprint.

Documents and masks are kept by window (a run of one document inside a sequence) and spelled out on request.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UsageError

HASH_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class PackSettings:
    """How documents become sequences.

    Attributes:
        max_seq_len: most tokens in a sequence, >= 2.
        pack: several windows to a sequence; False gives every window a sequence of its own.
        open_bins: sequences kept open for short windows; more fill better and take more memory and time.
    """

    max_seq_len: int = 512
    pack: bool = True
    open_bins: int = 64

    def __post_init__(self) -> None:
        if self.max_seq_len < 2:
            raise UsageError(f"max_seq_len: must be at least 2, found {self.max_seq_len}; give a larger one")
        if self.open_bins < 1:
            raise UsageError(f"open_bins: must be at least 1, found {self.open_bins}; give a larger number")


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One sequence of n tokens.

    Attributes:
        token_ids: int32 [n].
        documents: int32 [n], number of the document each token belongs to; attention stays inside it.
        loss_mask: uint8 [n], 1 where the prediction is trained: a next token exists and is not prompt.
    """

    token_ids: NDArray[np.int32]
    documents: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """Sequences of at most `settings.max_seq_len` tokens. Made by `pack`.

    Attributes:
        settings: how it was packed.
        token_ids: int32 [num_tokens], sequence after sequence.
        sequence_windows: int64 [num_sequences + 1], first window of each sequence.
        window_tokens: int64 [num_windows + 1], first token of each window.
        window_documents: int32 [num_windows], document of each window.
        window_masked: int32 [num_windows], first positions of the window that are not trained.
        window_ends: bool [num_windows], the window's last token is the last of its document.
        gap_windows: int64 [num_gaps], ascending: windows with further positions that are not trained, prompts
            between answers.
        gap_starts: int32 [num_gaps], first of these positions, counted in the window.
        gap_stops: int32 [num_gaps], the one after the last.
        sources: the files.
        document_sources: int32 [num_documents], index into `sources`.
        document_lines: int64 [num_documents], 1-based line; 0 for a whole file.
        num_targets: positions with loss_mask 1.

    All arrays may be memory-mapped and too long to be in memory: ask for the part that is needed.
    """

    settings: PackSettings
    token_ids: NDArray[np.int32] = field(repr=False)
    sequence_windows: NDArray[np.int64] = field(repr=False)
    window_tokens: NDArray[np.int64] = field(repr=False)
    window_documents: NDArray[np.int32] = field(repr=False)
    window_masked: NDArray[np.int32] = field(repr=False)
    window_ends: NDArray[np.bool_] = field(repr=False)
    gap_windows: NDArray[np.int64] = field(repr=False)
    gap_starts: NDArray[np.int32] = field(repr=False)
    gap_stops: NDArray[np.int32] = field(repr=False)
    sources: tuple[str, ...] = field(repr=False)
    document_sources: NDArray[np.int32] = field(repr=False)
    document_lines: NDArray[np.int64] = field(repr=False)
    num_targets: int

    def __len__(self) -> int:
        return self.num_sequences

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_windows) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_documents(self) -> int:
        return len(self.document_lines)

    @property
    def fill_rate(self) -> float:
        """Share of the positions of full-length sequences that hold a token, in (0, 1]."""
        return self.num_tokens / (self.num_sequences * self.settings.max_seq_len)

    def first_tokens(self, sequences: "slice | NDArray[np.int64]") -> NDArray[np.int64]:
        """int64: where the named sequences begin in `token_ids`."""
        return np.asarray(self.window_tokens[self.sequence_windows[:-1][sequences]])

    def sequence_lengths(self, sequences: "slice | NDArray[np.int64]" = slice(None)) -> NDArray[np.int64]:
        """int64, tokens in each of the named sequences; in all of them without names."""
        ends = self.window_tokens[self.sequence_windows[1:][sequences]]
        return np.asarray(ends - self.first_tokens(sequences))

    def tokens_in(self, sequences: range) -> int:
        """Tokens in a run of sequences; takes no time, whatever its length."""
        first, last = self.sequence_windows[[sequences.start, sequences.stop]]
        return int(self.window_tokens[last] - self.window_tokens[first])

    def targets_in(self, sequence: int) -> int:
        """Trained positions of a sequence."""
        windows = slice(*self.sequence_windows[sequence : sequence + 2])
        lengths = np.diff(self.window_tokens[windows.start : windows.stop + 1])
        masked = self.window_masked[windows]
        last_counted = self.window_ends[windows] & (masked < lengths)
        gaps = self._gaps_of(windows)
        in_gaps = self.gap_stops[gaps] - self.gap_starts[gaps]
        return int((lengths - masked - last_counted).sum()) - int(in_gaps.sum())

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index`, in 0 ... num_sequences - 1; the tokens are a view.

        Raises:
            IndexError: no such sequence.
        """
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        windows = slice(*self.sequence_windows[index : index + 2])
        bounds = self.window_tokens[windows.start : windows.stop + 1]
        first, lengths = bounds[0], np.diff(bounds)
        loss_mask = np.ones(bounds[-1] - first, dtype=np.uint8)
        starts = bounds[:-1] - first
        for start, masked in zip(starts, self.window_masked[windows], strict=True):
            loss_mask[start : start + masked] = 0
        gaps = self._gaps_of(windows)
        for window, begin, stop in zip(
            self.gap_windows[gaps], self.gap_starts[gaps], self.gap_stops[gaps], strict=True
        ):
            start = starts[window - windows.start]
            loss_mask[start + begin : start + stop] = 0
        loss_mask[(starts + lengths - 1)[self.window_ends[windows]]] = 0
        return PackedSequence(
            token_ids=self.token_ids[first : bounds[-1]],
            documents=np.repeat(self.window_documents[windows], lengths),
            loss_mask=loss_mask,
        )

    def document_source(self, document: int) -> str:
        """`file:line` of a document number; the file alone for a whole file.

        Raises:
            IndexError: no such document.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        source, line = self.sources[self.document_sources[document]], int(self.document_lines[document])
        return f"{source}:{line}" if line else source

    def sample_sequences(self, num_targets: int, *, seed: int = 0) -> NDArray[np.int64]:
        """Whole sequences, spread evenly over the data set, with at least `num_targets` trained positions.

        The data set is cut into equal strata and one sequence is drawn from each. For calibration.

        Args:
            num_targets: positions wanted; all sequences come back when there are fewer.
            seed: another seed draws other sequences.

        Returns:
            int64, ascending and distinct sequence numbers.
        """
        if num_targets >= self.num_targets:
            return np.arange(self.num_sequences, dtype=np.int64)
        count = max(1, int(np.ceil(num_targets / (self.num_targets / self.num_sequences))))
        chosen = self._one_per_stratum(count, seed)
        while sum(map(self.targets_in, chosen.tolist())) < num_targets:
            count = min(self.num_sequences, count + max(1, count // 16))
            chosen = self._one_per_stratum(count, seed)
        return chosen

    def fingerprint(self) -> str:
        """SHA-256 (hex) over settings, tokens, documents and masks; not over the names of the files."""
        return self._fingerprint

    def _gaps_of(self, windows: slice) -> slice:
        return slice(*np.searchsorted(self.gap_windows, [windows.start, windows.stop]).tolist())

    def _one_per_stratum(self, count: int, seed: int) -> NDArray[np.int64]:
        edges = np.arange(count + 1, dtype=np.int64) * self.num_sequences // count
        return np.random.default_rng(seed).integers(edges[:-1], edges[1:], dtype=np.int64)

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(b"pmetal-distill packed data 1\n")
        digest.update(json.dumps(asdict(self.settings), sort_keys=True).encode())
        columns = ["sequence_windows", "window_tokens", "window_documents", "window_masked", "window_ends"]
        if len(self.gap_windows):
            columns += ["gap_windows", "gap_starts", "gap_stops"]
        for name in (*columns, "token_ids"):
            values = getattr(self, name)
            digest.update(f"\n{name} {len(values)}\n".encode())
            for start in range(0, len(values), HASH_VALUES):
                part = values[start : start + HASH_VALUES]
                digest.update(part.astype(part.dtype.newbyteorder("<"), copy=False).data)
        return digest.hexdigest()
