"""Interpolation of the tail's log-partition A(b) between its stored nodes, as a fixed linear map per b = 1/T.

A(0) = log(V - k) is known without being stored, so b = 0 is a free, exact node. Cost: O(m^2) a temperature.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TailCurve:
    """A(b) = log sum_{j not in head} exp(b (z_j - z_ref)) as a polynomial through b = 0 and the stored nodes.

    Attributes:
        nodes: stored values of b, ascending, all > 0.
        vocab_size: V.
        k: entries in the head.
    """

    nodes: tuple[float, ...]
    vocab_size: int
    k: int

    def __post_init__(self) -> None:
        if not self.nodes or any(b <= a for a, b in zip((0.0, *self.nodes), self.nodes, strict=False)):
            raise ValueError(f"TailCurve: nodes must ascend from above 0, found {self.nodes}")
        if not 0 < self.k < self.vocab_size:
            raise ValueError(f"TailCurve: k must be from 1 to V-1={self.vocab_size - 1}, found {self.k}")

    @property
    def at_zero(self) -> float:
        """A(0) = log(V - k)."""
        return math.log(self.vocab_size - self.k)

    def weights(self, b: float) -> Float64:
        """Weights w with A(b) = w[0] * at_zero + curve @ w[1:], float64 [m + 1].

        Args:
            b: inverse temperature, from 0 to the last node.

        Raises:
            ValueError: b outside the nodes; a polynomial must not be trusted there.

        References:
            Berrut and Trefethen 2004, "Barycentric Lagrange interpolation", formula (4.2).
        """
        points = np.array((0.0, *self.nodes))
        if not 0.0 <= b <= points[-1]:
            raise ValueError(f"TailCurve: 1/T must be from 0 to {points[-1]:g}, found {b:g}")
        exact = np.flatnonzero(np.abs(points - b) < 1e-12)
        if exact.size:
            return np.asarray(np.eye(len(points))[exact[0]])
        gaps = points[:, None] - points[None, :]
        np.fill_diagonal(gaps, 1.0)
        terms = 1.0 / gaps.prod(axis=1) / (b - points)
        return np.asarray(terms / terms.sum(), np.float64)

    def slope_weights(self) -> Float64:
        """Weights w with A'(0) = w[0] * at_zero + curve @ w[1:], float64 [m + 1]; they sum to 0.

        A'(0) is the mean of z_j - z_ref over the tail.

        References:
            Berrut and Trefethen 2004, "Barycentric Lagrange interpolation", section 9.3.
        """
        nodes = np.array(self.nodes)
        gaps = nodes[:, None] - nodes[None, :]
        np.fill_diagonal(gaps, 1.0)
        others = -nodes[None, :] / gaps
        np.fill_diagonal(others, 1.0)
        return np.concatenate([[-(1.0 / nodes).sum()], others.prod(axis=1) / nodes])

    def slope(self, curve: npt.NDArray[np.floating]) -> Float64:
        """A'(0) from stored values.

        Args:
            curve: [..., m], A at the nodes.

        Returns:
            float64 [...].
        """
        weights = self.slope_weights()
        return np.asarray((curve.astype(np.float64) - self.at_zero) @ weights[1:], np.float64)

    def evaluate(self, curve: npt.NDArray[np.floating], b: float) -> Float64:
        """A(b) from stored values.

        Args:
            curve: [..., m], A at the nodes.
            b: inverse temperature.

        Returns:
            float64 [...].
        """
        weights = self.weights(b)
        return np.asarray(weights[0] * self.at_zero + curve.astype(np.float64) @ weights[1:], np.float64)
