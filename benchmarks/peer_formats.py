"""Formats of cached teachers, how they are read, and two that need no package: dense, JSON lines.

A format writes what the teacher said about a text into a folder and reads it back; a reading turns what was
read into probabilities over the vocabulary, as a loss that trains on the format would see them.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import zstandard
from safetensors.numpy import load_file, save_file

from benchmarks.gradients import bucketed, softmax

ROWS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """A text and the teacher's logits after each of its tokens.

    Attributes:
        windows: int32 [length] each; n tokens in all.
        logits: float32 [n, V].
        states: the teacher's final hidden states, float32 [n, d].
        texts: the windows as text.
    """

    windows: list[np.ndarray]
    logits: np.ndarray
    states: np.ndarray
    texts: list[str]

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [n]."""
        return np.concatenate(self.windows)

    @property
    def slices(self) -> list[slice]:
        """The rows of each window."""
        ends = np.cumsum([len(window) for window in self.windows]).tolist()
        return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]

    def parts(self) -> Iterator[slice]:
        """All rows, some at a time."""
        for start in range(0, len(self.logits), ROWS):
            yield slice(start, start + ROWS)


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """What a reader gets: log-probabilities (or logits) of some tokens, or of all where `ids` is None.

    Attributes:
        ids: int32 [n, k].
        logprobs: [n, k] or [n, V]; -inf where there is no entry.
        counts: how often each was drawn, [n, k], of a sampled target.
    """

    ids: np.ndarray | None
    logprobs: np.ndarray
    counts: np.ndarray | None = None

    def __getitem__(self, part: slice) -> "Stored":
        """Some rows."""
        arrays = (self.ids, self.logprobs, self.counts)
        return Stored(*(array if array is None else array[part] for array in arrays))


class Format(Protocol):
    """How one tool keeps a teacher."""

    name: str

    def write(self, folder: Path, said: Said) -> None:
        """Writes files into an empty folder; timed."""

    def open(self, folder: Path, said: Said) -> Callable[[], Stored]:
        """What reads them all; only the call of the result is timed. The text is there to pair rows with."""


Reading = Callable[[Stored, float, np.ndarray], np.ndarray]
"""Rows as stored, temperature, the student's distribution [m, V] -> probabilities [m, V]."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of rows of logits, float32."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def top(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and log-probabilities float32 of the k likeliest tokens, best first."""
    logprobs = log_softmax(logits)
    ids = np.argpartition(logprobs, logprobs.shape[1] - k, axis=1)[:, -k:]
    found = np.take_along_axis(logprobs, ids, axis=1)
    order = np.argsort(-found, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1).astype(np.int32)
    return ids, np.take_along_axis(found, order, axis=1)


def everything(stored: Stored, temperature: float, guessed: np.ndarray) -> np.ndarray:
    """The whole distribution."""
    return softmax(stored.logprobs.astype(np.float32), temperature)


def renormalised(stored: Stored, temperature: float, guessed: np.ndarray) -> np.ndarray:
    """Nothing outside the kept tokens."""
    return spread(stored, softmax(stored.logprobs, temperature), guessed)


def both_renormalised(stored: Stored, temperature: float, guessed: np.ndarray) -> np.ndarray:
    """What makes of forward KL's gradient that of a loss which renormalises both sides within the head.

    That one is q~ - p~ at the kept tokens, with both made to sum to 1 there, and 0 elsewhere; q less what is
    returned here is the same.
    """
    kept = np.take_along_axis(guessed, stored.ids, axis=1)
    gap = softmax(stored.logprobs, temperature) - kept / kept.sum(axis=1, keepdims=True)
    return guessed + spread(stored, gap, guessed)


def one_event(stored: Stored, temperature: float, guessed: np.ndarray) -> np.ndarray:
    """All other tokens as one more token, softened like the others; the student's shape within."""
    head = stored.logprobs.astype(np.float64)
    rest = np.log(np.maximum(-np.expm1(np.logaddexp.reduce(head, axis=1, keepdims=True)), 1e-12))
    soft = softmax(np.concatenate([head, rest], axis=1), temperature)
    return bucketed(stored.ids, soft[:, :-1], soft[:, -1], guessed)


def mass_at_one(stored: Stored, temperature: float, guessed: np.ndarray) -> np.ndarray:
    """The head's mass stays what it is at T = 1; softened within; the student's shape outside."""
    head = stored.logprobs.astype(np.float64)
    mass = np.minimum(np.exp(head).sum(axis=1, keepdims=True), 1)
    return bucketed(stored.ids, mass * softmax(head, temperature), 1 - mass[:, 0], guessed)


def uniform(stored: Stored, temperature: float, guessed: np.ndarray) -> np.ndarray:
    """All other tokens alike."""
    head = stored.logprobs.astype(np.float64)
    others = guessed.shape[1] - head.shape[1]
    rest = np.maximum(1 - np.exp(head).sum(axis=1, keepdims=True), 1e-12) / others
    weights = np.exp(head / temperature)
    each = rest ** (1 / temperature)
    total = weights.sum(axis=1, keepdims=True) + others * each
    found = np.broadcast_to(each / total, guessed.shape).astype(np.float32)
    np.put_along_axis(found, stored.ids, (weights / total).astype(np.float32), axis=1)
    return found


def spread(stored: Stored, probabilities: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    """Probabilities [m, k] of the kept tokens among all; entries of -inf add nothing."""
    found = np.zeros_like(guessed)
    rows = np.arange(len(found))[:, None]
    np.add.at(found, (np.broadcast_to(rows, stored.ids.shape), stored.ids), probabilities)
    return found


class Dense:
    """Logits of all tokens as float16 in safetensors: what all others leave something out of."""

    name = "dense float16, safetensors"

    def write(self, folder: Path, said: Said) -> None:
        arrays = {"token_ids": said.token_ids, "logits": said.logits.astype(np.float16)}
        save_file(arrays, folder / "logits.safetensors")

    def open(self, folder: Path, said: Said) -> Callable[[], Stored]:
        return lambda: Stored(None, load_file(folder / "logits.safetensors")["logits"])


@dataclass(frozen=True, slots=True)
class JsonLines:
    """`prompt_logprobs` of a vLLM server: a line a text, for every token an object by id."""

    k: int = 20
    packed: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"vLLM JSON lines, top {self.k}{', zstd' if self.packed else ''}"

    def write(self, folder: Path, said: Said) -> None:
        lines = []
        for window, part in zip(said.windows, said.slices, strict=True):
            ids, logprobs = top(said.logits[part], self.k)
            entries = [
                {
                    str(i): {"logprob": p, "rank": rank}
                    for rank, (i, p) in enumerate(zip(*row, strict=True), 1)
                }
                for row in zip(ids.tolist(), logprobs.tolist(), strict=True)
            ]
            record = {"prompt_token_ids": window.tolist(), "prompt_logprobs": [None, *entries]}
            lines.append(json.dumps(record))
        text = ("\n".join(lines) + "\n").encode()
        (folder / "responses.jsonl").write_bytes(zstandard.compress(text) if self.packed else text)

    def open(self, folder: Path, said: Said) -> Callable[[], Stored]:
        def read() -> Stored:
            raw = (folder / "responses.jsonl").read_bytes()
            text = zstandard.decompress(raw) if self.packed else raw
            entries = [e for line in text.splitlines() for e in json.loads(line)["prompt_logprobs"][1:]]
            ids = np.array([[int(token) for token in entry] for entry in entries], np.int32)
            values = [[one["logprob"] for one in entry.values()] for entry in entries]
            return Stored(ids, np.array(values, np.float32))

        return read
