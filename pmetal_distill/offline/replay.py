"""Compares stored targets with the logits of the teacher that is said to have made them.

What a reader rebuilds must be within the rounding of the format, plus the teacher's own noise: another batch
or device gives logits that differ in their last digits. Costs a sort of each row, for a sketch also V x r
products a row and V x r^2 once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pmetal_distill.offline.sketch import metric
from schemas.arrays import Float32, Int32, TargetArrays
from schemas.basis import SketchBasis
from schemas.grid import MAX_CURVE, MAX_STEPS, TOP_STEP
from schemas.spec import TargetSpec

Float64 = npt.NDArray[np.float64]
Part = Literal["head_ids", "head_logprobs", "tail_curve", "coordinates"]

NOISE = 2e-3
NOISE_ROUNDINGS = 4
SKETCH_SHARE = 0.25
_ROUNDED = 1e-5


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A stored value that the teacher's logits contradict.

    Attributes:
        row: which of the compared rows.
        part: field of `TargetArrays`.
        message: what must hold, what was found.
    """

    row: int
    part: Part
    message: str


def noise_of(logits: Float32, rounding: float) -> Float64:
    """How far two runs of a teacher may differ in a logit, nats, float64 [n].

    Args:
        logits: [n, V].
        rounding: unit roundoff of the type that the teacher computes in, e.g. 2^-9 for bfloat16.

    Returns:
        2e-3 + 4 roundings of the row's largest magnitude.
    """
    largest = np.abs(logits).max(axis=1).astype(np.float64)
    return np.asarray(NOISE + NOISE_ROUNDINGS * rounding * largest, np.float64)


def compare_head_and_curve(
    targets: TargetArrays, logits: Float32, spec: TargetSpec, *, noise: Float64
) -> list[Mismatch]:
    """Head ids, log-probabilities and tail curve against the exact ones.

    With `step` the grid of the log-probabilities:
        - an id may differ from the exact one of its rank only where their logits tie within `noise`;
        - distances to the top entry are within step / 2 + noise;
        - the top entry is within half of its own grid (of the coarser of the two grids that it follows from,
          with a tail) + noise;
        - A(b), relative to the decoded z_ref, is within curve_step / 2 + noise max(1, b).
    A value that saturates its grid must only lie on the right side.

    Args:
        targets: [n], decoded at the stored k.
        logits: [n, V] of the same rows, exact.
        spec: as stored.
        noise: [n], nats; see `noise_of`.

    Returns:
        at most one mismatch a row and part, by row.
    """
    rows = np.arange(len(logits))[:, None]
    exact = logits.astype(np.float64)
    order = np.argsort(-exact, axis=1, kind="stable")[:, : spec.k]
    best, named = exact[rows, order], exact[rows, targets.head_ids]
    loose = noise[:, None]
    found = _first_bad(
        "head_ids",
        (targets.head_ids != order) & (np.abs(named - best) > loose),
        lambda r, i: (
            f"head id {i} must be {order[r, i]} (logit {best[r, i]:.4f}), "
            f"found {targets.head_ids[r, i]} (logit {named[r, i]:.4f})"
        ),
    )
    stored = targets.head_logprobs.astype(np.float64)
    found += _compare_logprobs(stored, best, exact, spec, loose)
    if spec.num_nodes:
        z_ref = best[:, 0] + stored[:, -1] - stored[:, 0]
        tail = exact.copy()
        np.put_along_axis(tail, order, -np.inf, axis=1)
        found += _compare_curve(targets.tail_curve.astype(np.float64), tail - z_ref[:, None], spec, loose)
    return sorted(found, key=lambda mismatch: mismatch.row)


def _compare_logprobs(
    stored: Float64, best: Float64, exact: Float64, spec: TargetSpec, noise: Float64
) -> list[Mismatch]:
    below, true = stored - stored[:, :1], best - best[:, :1]
    allowed = spec.logprob_step / 2 + _ROUNDED * np.abs(stored).max(axis=1, keepdims=True) + noise
    floor = -(MAX_STEPS - 0.5) * spec.logprob_step
    bad = (np.abs(below - true) > allowed) & ~((below <= floor) & (true <= below + allowed))
    top = best[:, 0] - _lse(exact)
    grid = max(spec.logprob_step, spec.curve_step) if spec.num_nodes else TOP_STEP
    bad[:, 0] = np.abs(stored[:, 0] - top) > grid / 2 + _ROUNDED + noise[:, 0]
    true = top[:, None] + true
    return _first_bad(
        "head_logprobs",
        bad,
        lambda r, i: f"log-probability {i} must be {true[r, i]:.4f}, found {stored[r, i]:.4f}",
    )


def _compare_curve(curve: Float64, tail: Float64, spec: TargetSpec, noise: Float64) -> list[Mismatch]:
    nodes = np.array(spec.curve_nodes)
    true = np.stack([_lse(b * tail) for b in nodes], axis=1)
    allowed = spec.curve_step / 2 + _ROUNDED * np.abs(true) + noise * np.maximum(1.0, nodes)
    limit = (MAX_CURVE - 0.5) * spec.curve_step
    clipped = (np.abs(curve) >= limit) & (np.abs(true) >= limit - allowed) & (curve * true > 0)
    return _first_bad(
        "tail_curve",
        (np.abs(curve - true) > allowed) & ~clipped,
        lambda r, i: f"tail curve at 1/T={nodes[i]:g} must be {true[r, i]:.4f}, found {curve[r, i]:.4f}",
    )


def _lse(rows: Float64) -> Float64:
    largest = rows.max(axis=1)
    return np.asarray(largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1)), np.float64)


def _first_bad(part: Part, bad: npt.NDArray[np.bool_], message: Callable[[int, int], str]) -> list[Mismatch]:
    """One mismatch for each row of `bad` [n, width] that has one."""
    return [Mismatch(int(r), part, message(int(r), int(bad[r].argmax()))) for r in np.flatnonzero(bad.any(1))]


class SketchJudge:
    """Says whether stored sketch coordinates are those of a row of logits.

    The map that made them is not in a cache. It is the projection of a row's logits on the basis in the
    metric of the calibration, so the one in the metric of the replayed rows comes close: the two differ by
    what the wrong metric sees of that part of the row that the basis cannot express. A row passes if its
    coordinates are, beyond half a step each, at most `SKETCH_SHARE` of the size of that part away. A
    saturated coordinate may lie further out. Coordinates of a token with nearly the same logits pass too.
    Measured on SmolLM2-135M at r=64: honest rows at most 0.1 with the metric of one document, 0.03 with that
    of 256 rows of many; with the coordinates of the token behind it 0.28 at least, 1.8 in the median.

    Args:
        basis: as stored.
        meant: float64 [V], sum of `meant_tokens` over replayed rows; some hundred rows are enough.
    """

    def __init__(self, basis: SketchBasis, meant: Float64) -> None:
        self.basis = basis
        self._weights = metric(meant)
        self._share = self._weights / self._weights.sum()
        components = basis.components.astype(np.float64)
        components -= self._share @ components
        weighted = components * self._weights[:, None]
        self._components, gram = components, weighted.T @ components
        floor = np.eye(basis.rank) * (1e-9 * np.trace(gram) / basis.rank)
        self._projection = np.linalg.solve(gram + floor, weighted.T)

    def compare(self, targets: TargetArrays, token_ids: Int32, logits: Float32) -> list[Mismatch]:
        """Mismatches of rows [n], by row.

        Args:
            targets: [n], decoded at the stored k and rank.
            token_ids: int32 [n], their input ids.
            logits: [n, V], exact.
        """
        distances, sizes = self.distances(targets, token_ids, logits)
        return [
            Mismatch(
                int(r),
                "coordinates",
                f"sketch coordinates must be within {SKETCH_SHARE * sizes[r]:.4g} of the logits' own, "
                f"found {distances[r]:.4g} beyond rounding",
            )
            for r in np.flatnonzero(distances > SKETCH_SHARE * sizes + _ROUNDED * self.basis.step)
        ]

    def distances(self, targets: TargetArrays, token_ids: Int32, logits: Float32) -> tuple[Float64, Float64]:
        """How far coordinates lie from the projected ones beyond rounding, and how much cannot be projected.

        Returns:
            float64 [n] both, in the units of the coordinates.
        """
        rows = logits.astype(np.float64) - self.basis.mean
        rows -= (rows @ self._share)[:, None]
        own = rows @ self._projection.T
        rows -= own @ self._components.T
        sizes = np.sqrt(np.square(rows) @ self._weights)
        away = own - targets.coordinates
        beyond = np.maximum(np.abs(away) - self.basis.step / 2, 0.0)
        beyond[self._saturated(targets, token_ids, away)] = 0.0
        return np.sqrt(np.square(beyond).sum(axis=1)), sizes

    def _saturated(self, targets: TargetArrays, token_ids: Int32, away: Float64) -> npt.NDArray[np.bool_]:
        """Where a coordinate [n, r] is the last of its grid, on the side of the projected one."""
        left = targets.coordinates - self.basis.predict(token_ids, targets.head_ids)
        codes = np.rint(left / self.basis.step)
        largest = np.concatenate([np.full(g.stop - g.start, g.largest) for g in self.basis.groups])
        return np.asarray((np.abs(codes) >= largest) & (codes * away > 0))
