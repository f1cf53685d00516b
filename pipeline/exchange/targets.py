"""Heads to the arrays that a cache stores. Costs a few passes over [n, k].

With tail "bucket" the curve has one node, b = 1: what the head's probabilities lack of one is the tail's mass
at T=1. With tail "none" rows with fewer than k entries are filled with tokens of probability e^-512, as small
as the format can say.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.exchange.sequences import ABSENT, Heads
from schemas.arrays import Float32, Int32, TargetArrays
from schemas.grid import MAX_STEPS
from schemas.spec import TargetSpec

LEAST_TAIL = 1e-6
ONE_NODE = (1.0,)


@dataclass(frozen=True, slots=True)
class Corrections:
    """Rows whose tail was moved to where the format can hold it.

    Attributes:
        no_tail: the head summed to one or above; the tail was given `LEAST_TAIL`.
        heavy_tail: more mass was missing than tokens below the last entry can have.
        padded: rows filled up with impossible tokens.
    """

    no_tail: int = 0
    heavy_tail: int = 0
    padded: int = 0

    def __add__(self, other: "Corrections") -> "Corrections":
        return Corrections(
            self.no_tail + other.no_tail,
            self.heavy_tail + other.heavy_tail,
            self.padded + other.padded,
        )


def head_targets(heads: Heads, spec: TargetSpec) -> tuple[TargetArrays, Corrections]:
    """Targets [n, ...] of trained rows.

    Args:
        heads: of these rows; with a tail every row has at least `spec.k` entries.
        spec: tail "none" or "bucket" with the single node 1.
    """
    ids, logprobs = _resized(heads, spec.k)
    corrections = Corrections()
    curve = np.zeros((len(ids), 0), np.float32)
    short = logprobs[:, -1] == ABSENT
    if short.any():
        ids, logprobs = ids.copy(), logprobs.copy()
        _fill(ids, logprobs, np.flatnonzero(short), spec)
        corrections += Corrections(padded=int(short.sum()))
    if spec.tail == "bucket":
        curve, moved = _curve_at_one(logprobs, spec)
        corrections += moved
    empty = np.zeros((len(ids), 0), np.float32)
    return TargetArrays(ids, logprobs, curve, empty), corrections


def _resized(heads: Heads, k: int) -> tuple[Int32, Float32]:
    missing = k - heads.ids.shape[1]
    if missing <= 0:
        return heads.ids[:, :k], heads.logprobs[:, :k]
    rows = len(heads.ids)
    ids = np.concatenate([heads.ids, np.zeros((rows, missing), np.int32)], axis=1)
    return ids, np.concatenate([heads.logprobs, np.full((rows, missing), ABSENT)], axis=1)


def _fill(ids: Int32, logprobs: Float32, rows: npt.NDArray[np.int64], spec: TargetSpec) -> None:
    """Gives absent entries the lowest ids that the row does not name, and the least probability."""
    depth = np.float32(MAX_STEPS * spec.logprob_step)
    for row in rows:
        present = int((logprobs[row] > ABSENT).sum())
        spare = np.setdiff1d(np.arange(spec.k, dtype=np.int32), ids[row, :present])
        ids[row, present:] = spare[: spec.k - present]
        logprobs[row, present:] = logprobs[row, 0] - depth


def _curve_at_one(logprobs: Float32, spec: TargetSpec) -> tuple[Float32, Corrections]:
    exact = logprobs.astype(np.float64)
    mass = 1 - np.exp(exact).sum(axis=1)
    no_tail = mass < LEAST_TAIL
    value = np.log(np.maximum(mass, LEAST_TAIL)) - exact[:, -1]
    most = np.log(spec.vocab_size - spec.k)
    heavy = value > most
    curve = np.minimum(value, most).astype(np.float32)[:, None]
    return curve, Corrections(no_tail=int(no_tail.sum()), heavy_tail=int(heavy.sum()))
