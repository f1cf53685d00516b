"""The first pass over a source: sizes, checks, the hash of its text, a sample of its heads.

Costs one reading of the source. Memory: four bytes a sequence, and 4,096 sampled rows.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.console import Console
from pipeline.exchange.responses import UNMAPPED
from pipeline.exchange.sequences import MAX_ENTRIES, Heads, Source, SourceSequence
from schemas.arrays import Float32, Int32
from schemas.errors import DataError

SAMPLED_ROWS = 4096


@dataclass(slots=True, eq=False)
class Survey:
    """What a source holds.

    Attributes:
        vocab_size: V, which no token may reach.
        tolerance: how far the probabilities of a row may sum above one.
        lengths: tokens of each sequence.
        num_targets: rows with something to learn from.
        rows_by_count: int64 [MAX_ENTRIES + 1], such rows by number of entries; zeros for dense logits.
        mass: sum over these rows of the probability of their entries.
        sample: rows spread over the source, for entropy coding.
    """

    vocab_size: int
    tolerance: float
    lengths: list[int] = field(default_factory=list)
    num_targets: int = 0
    rows_by_count: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_ENTRIES + 1, np.int64))
    mass: float = 0.0
    sample: "RowSample" = field(default_factory=lambda: RowSample())
    _digest: "hashlib._Hash" = field(default_factory=lambda: hashlib.sha256(b"pmetal-distill import 1\n"))

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences."""
        return sum(self.lengths)

    @property
    def widest(self) -> int:
        """Most entries of a trained row."""
        return int(np.flatnonzero(self.rows_by_count)[-1])

    def entries_of(self, share: float) -> int:
        """The largest number of entries that at least this share of the trained rows has."""
        at_least = np.cumsum(self.rows_by_count[::-1])[::-1]
        return int(np.flatnonzero(at_least >= share * at_least[0])[-1])

    def rows_below(self, count: int) -> int:
        """Trained rows with fewer entries than `count`."""
        return int(self.rows_by_count[:count].sum())

    def text_hash(self) -> str:
        """SHA-256 hex of tokens, documents and masks, in order."""
        return self._digest.hexdigest()

    def add(self, sequence: SourceSequence) -> None:
        """Counts a sequence in.

        Raises:
            DataError: a token outside the vocabulary, or probabilities that sum to more than one.
        """
        self._check_ids(sequence.token_ids, sequence.where, "token ids")
        self.lengths.append(len(sequence.token_ids))
        self.num_targets += int(sequence.loss_mask.sum())
        self._digest.update(len(sequence.token_ids).to_bytes(4, "little"))
        for column, dtype in ((sequence.token_ids, "<i4"), (sequence.documents, "<i4")):
            self._digest.update(column.astype(dtype).tobytes())
        self._digest.update(sequence.loss_mask.astype(np.uint8).tobytes())
        if isinstance(sequence.said, Heads):
            self._add_heads(sequence, sequence.said)

    def _add_heads(self, sequence: SourceSequence, heads: Heads) -> None:
        mask = sequence.loss_mask
        if not mask.any():
            return
        trained = Heads(heads.ids[mask], heads.logprobs[mask])
        self._check_ids(trained.ids, sequence.where, "entries")
        with np.errstate(over="ignore"):
            mass = np.exp(trained.logprobs.astype(np.float64)).sum(axis=1)
        if mass.max() > 1 + self.tolerance:
            row = int(np.flatnonzero(mask)[mass.argmax()])
            raise DataError(
                f"{sequence.where} row {row}: probabilities must sum to at most 1, found {mass.max():.6g}; "
                "give log-probabilities over the whole vocabulary at temperature 1, not logits"
            )
        self.mass += float(mass.sum())
        self.rows_by_count += np.bincount(trained.counts, minlength=MAX_ENTRIES + 1)
        self.sample.add(trained)

    def _check_ids(self, ids: Int32, where: str, what: str) -> None:
        if ids.size and ids.max() >= self.vocab_size:
            raise DataError(
                f"{where}: {what} must be below the vocabulary size {self.vocab_size}, found {ids.max()}; "
                "give the teacher's tokenizer, or --vocab-size"
            )


@dataclass(slots=True, eq=False)
class RowSample:
    """Every n-th row, n doubled whenever too many have come together. The same for the same rows."""

    stride: int = 1
    seen: int = 0
    kept: list[tuple[Int32, Float32]] = field(default_factory=list)

    def add(self, heads: Heads) -> None:
        """Keeps some of these rows."""
        chosen = np.arange(-self.seen % self.stride, len(heads.ids), self.stride)
        self.kept += [(heads.ids[i].copy(), heads.logprobs[i].copy()) for i in chosen]
        self.seen += len(heads.ids)
        while len(self.kept) > SAMPLED_ROWS:
            self.stride *= 2
            self.kept = self.kept[::2]

    def heads(self) -> Heads:
        """The kept rows, as wide as the widest."""
        width = max((len(ids) for ids, _ in self.kept), default=1)
        ids = np.zeros((len(self.kept), width), np.int32)
        logprobs = np.full((len(self.kept), width), -np.inf, np.float32)
        for i, (row_ids, row_logprobs) in enumerate(self.kept):
            ids[i, : len(row_ids)], logprobs[i, : len(row_logprobs)] = row_ids, row_logprobs
        return Heads(ids, logprobs)


def survey(source: Source, vocab_size: int, console: Console) -> Survey:
    """Reads a source through.

    Raises:
        DataError: as `Survey.add`; no sequence at all; or more rows without a usable target than with one.
    """
    found = Survey(vocab_size, source.tolerance)
    with console.progress("reading", total=len(source.files), unit="files") as progress:
        for sequence in source.sequences():
            found.add(sequence)
            progress.tell(f"{len(found.lengths):,} sequences")
            progress.advance(0)
        progress.advance(len(source.files))
    if not found.lengths or not found.num_targets:
        raise DataError(
            f"{source.files[0]}: must hold sequences with targets, found {len(found.lengths)} sequences and "
            f"{found.num_targets} targets; give other data"
        )
    if source.dropped[UNMAPPED] > found.num_targets:
        raise DataError(
            f"{source.files[0]}: most positions must have tokens of the tokenizer, found "
            f"{source.dropped[UNMAPPED]:,} {UNMAPPED} against {found.num_targets:,} others; give the "
            "teacher's tokenizer, or ask the server for token ids"
        )
    return found
