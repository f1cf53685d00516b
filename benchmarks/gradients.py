"""How wrong targets make the LM-head gradient of forward KL: relative error over all tokens of a text.

The figure is || sum_n s_n (p^_n - p_n)' || / || sum_n s_n (q_n - p_n)' || (Frobenius), s and q the hidden
states and distribution of a student, p the teacher, p^ the target as read from a file. It is taken along
128 random directions of s: the same ones above and below.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from pmetal_distill.models import LoadedModel
from pmetal_distill.offline.capture import as_numpy

TEMPERATURES = (1.0, 2.0, 4.0)
CHUNK, DIRECTIONS = 128, 128


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Tokens of some documents, cut into windows, and what the models make of them."""

    windows: list[np.ndarray]
    states: np.ndarray
    student: np.ndarray

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [n]."""
        return np.concatenate(self.windows)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Some rows of a text: the teacher's logits [m, V] and states, and the student's distribution by T."""

    part: slice
    token_ids: np.ndarray
    logits: np.ndarray
    states: np.ndarray
    guessed: dict[float, np.ndarray]


class Target(Protocol):
    """A kind of target that is being measured."""

    name: str
    result: dict[str, Any]

    def rebuilt(self, chunk: Chunk) -> Iterator[tuple[float, np.ndarray]]:
        """Probabilities [m, V] at every temperature; the caller may overwrite them."""


class Sums:
    """sum_n (directions' s_n) g_n' at every temperature: [DIRECTIONS, V]."""

    def __init__(self, vocab_size: int) -> None:
        self._sums = {t: np.zeros((DIRECTIONS, vocab_size), np.float32) for t in TEMPERATURES}

    def __getitem__(self, temperature: float) -> np.ndarray:
        return self._sums[temperature]

    def add(self, temperature: float, along: np.ndarray, rows: np.ndarray) -> None:
        """Adds rows [m, V] of states `along` the directions [DIRECTIONS, m]."""
        self._sums[temperature] += along @ rows


def softmax(rows: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of rows of logits."""
    shifted = (rows - rows.max(axis=1, keepdims=True)) * np.float32(1 / temperature)
    np.exp(shifted, out=shifted)
    return shifted / shifted.sum(axis=1, keepdims=True)


def bucketed(ids: np.ndarray, head: np.ndarray, mass: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    """Probabilities of a head [m, k], and a tail of `mass` [m] in which the student keeps its own shape."""
    found = guessed.copy()
    np.put_along_axis(found, ids, 0, axis=1)
    found *= (mass / found.sum(axis=1, dtype=np.float64)).astype(np.float32)[:, None]
    np.put_along_axis(found, ids, head.astype(np.float32), axis=1)
    return found


def measure_errors(targets: Sequence[Target], text: Text, teacher: LoadedModel, student: LoadedModel) -> None:
    """Sets gradient@T of every target, and estimate@T, which knows the teacher only."""
    rng = np.random.default_rng(7)
    directions = rng.standard_normal((text.student.shape[1], DIRECTIONS)).astype(np.float32)
    right, meant = Sums(teacher.vocab_size), Sums(teacher.vocab_size)
    mean = {t: np.zeros(teacher.vocab_size) for t in TEMPERATURES}
    mean_state = np.zeros(DIRECTIONS)
    wrong = [(Sums(teacher.vocab_size), Sums(teacher.vocab_size)) for _ in targets]
    for chunk, exact in _chunks(text, teacher, student):
        along, ahead = (text.student[chunk.part] @ directions).T, (chunk.states @ directions).T
        mean_state += ahead.sum(axis=1)
        for t in TEMPERATURES:
            right.add(t, along, chunk.guessed[t] - exact[t])
            meant.add(t, ahead, exact[t])
            mean[t] += exact[t].sum(axis=0)
        for target, (real, estimated) in zip(targets, wrong, strict=True):
            for t, found in target.rebuilt(chunk):
                found -= exact[t]
                real.add(t, along, found)
                estimated.add(t, ahead, found)
    norm = np.linalg.norm
    for target, (real, estimated) in zip(targets, wrong, strict=True):
        for t in TEMPERATURES:
            centred = meant[t] - np.outer(mean_state, mean[t] / len(text.states))
            target.result[f"gradient@{t:g}"] = float(norm(real[t]) / norm(right[t]))
            target.result[f"estimate@{t:g}"] = float(norm(estimated[t]) / norm(centred))


def _chunks(
    text: Text, teacher: LoadedModel, student: LoadedModel
) -> Iterator[tuple[Chunk, dict[float, np.ndarray]]]:
    """Rows of the text, and the teacher's distribution at every temperature."""
    token_ids = text.token_ids
    for start in range(0, len(text.states), CHUNK):
        part = slice(start, start + CHUNK)
        logits = as_numpy(teacher.logits(mx.array(text.states[part])))
        guess = as_numpy(student.logits(mx.array(text.student[part])))
        guessed = {t: softmax(guess, t) for t in TEMPERATURES}
        exact = {t: softmax(logits, t) for t in TEMPERATURES}
        yield Chunk(part, token_ids[part], logits, text.states[part], guessed), exact
