"""Calibration: do predictions of confidence c come true in a share c of cases? Costs three sums a bin.

Two outcomes are of interest for a student's first choice: that the text goes on with it (0 or 1), and the
probability that the teacher gives it. A student that equals its teacher has error 0 against the second.

References:
    Guo et al. 2017, arXiv:1706.04599, section 2: reliability diagrams, expected calibration error (3).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_BINS = 15
Float = npt.NDArray[np.floating[Any]]


def _zeros() -> npt.NDArray[np.float64]:
    return np.zeros((3, NUM_BINS))


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Sums of predictions by confidence, in 15 bins of equal width, ((m - 1) / 15, m / 15].

    Attributes:
        sums: float64 [3, 15]: number of predictions, their confidences, their outcomes.
    """

    sums: npt.NDArray[np.float64] = field(default_factory=_zeros)

    def add(self, confidence: Float, outcome: Float) -> None:
        """Adds predictions.

        Args:
            confidence: [n], in [0, 1].
            outcome: [n], in [0, 1].
        """
        bins = np.clip(
            np.ceil(confidence.astype(np.float64) * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1
        )
        for row, values in zip(self.sums, (np.ones(len(bins)), confidence, outcome), strict=True):
            row += np.bincount(bins, weights=values, minlength=NUM_BINS)

    @property
    def error(self) -> float:
        """Expected calibration error: mean over predictions of |outcome - confidence| of their bin."""
        count, confidence, outcome = self.sums
        return float(np.abs(outcome - confidence).sum() / max(count.sum(), 1.0))

    def bins(self) -> list[dict[str, float]]:
        """The reliability diagram: bounds, tokens, mean confidence and outcome of bins that are not empty."""
        return [
            {
                "above": m / NUM_BINS,
                "up_to": (m + 1) / NUM_BINS,
                "tokens": int(count),
                "confidence": confidence / count,
                "accuracy": outcome / count,
            }
            for m, (count, confidence, outcome) in enumerate(self.sums.T.tolist())
            if count
        ]
