"""How far rebuilt targets are from the teacher. Costs an exp and 64 products per logit and temperature."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pmetal_distill.offline.capture import Rows, as_numpy
from pmetal_distill.offline.rebuild import reconstruct_logprobs
from schemas.arrays import Float32, TargetArrays
from schemas.basis import SketchBasis
from schemas.spec import TargetSpec
from schemas.tail import tail_logits

TEMPERATURES = (1.0, 2.0, 4.0)
DIRECTIONS = 64
_ROWS = 64


@dataclass(frozen=True, slots=True)
class TargetError:
    """Errors of a target at one temperature, averaged over tokens.

    Attributes:
        kl: KL(teacher || rebuilt), nats; infinite where the tail is dropped.
        total_variation: half the sum of |p - p^|.
        gradient: || sum_n f_n (p^_n - p_n)' || / || sum_n f_n (p_n - p~)' ||, Frobenius, f the teacher's
            final hidden states and p~ the mean of p: the relative error of the LM-head gradient of forward
            KL for a student that knows no more than the mean. Another student has a constant times that
            (`docs/target.md`). Falls with the number of tokens: compare equal numbers only.
    """

    kl: float
    total_variation: float
    gradient: float


@dataclass(slots=True, eq=False)
class _Sums:
    kl: float
    variation: float
    wrong: Float32
    right: Float32
    mean: npt.NDArray[np.float64]


@dataclass(slots=True, eq=False)
class ErrorMeter:
    """Adds up errors over chunks of rows. Memory: 2 x 64 x V floats a temperature.

    Args:
        spec: of the targets.
        basis: for tail "sketch".
        temperatures: where to measure.
    """

    spec: TargetSpec
    basis: SketchBasis | None = None
    temperatures: Sequence[float] = TEMPERATURES
    tokens: int = 0
    _features: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(DIRECTIONS))
    _sums: dict[float, _Sums] = field(default_factory=dict)
    _directions: Float32 | None = None

    def add(self, logits: Rows, targets: TargetArrays, features: Float32) -> None:
        """Counts rows in.

        Args:
            logits: [n, V], exact.
            targets: the same rows, as a reader gets them.
            features: [n, d], final hidden states (or anything that a student's hidden states resemble).
        """
        logits, projected = as_numpy(logits), self._projected(features)
        self._features += projected.sum(axis=0, dtype=np.float64)
        self.tokens += len(logits)
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add_block(logits[rows], targets[rows], projected[rows])

    def result(self) -> dict[float, TargetError]:
        """Errors per temperature; empty before any row."""
        return {t: self._error(s) for t, s in self._sums.items()}

    def later(self) -> Callable[[], dict[float, TargetError]]:
        """As `DeviceErrorMeter.later`: here nothing is queued."""
        return self.result

    def _projected(self, features: Float32) -> Float32:
        if self._directions is None:
            self._directions = directions(features.shape[1])
        return np.asarray(features, np.float32) @ self._directions

    def _add_block(self, logits: Float32, targets: TargetArrays, features: Float32) -> None:
        tail = tail_logits(self.basis, self.spec.curve, targets) if self.basis else None
        largest = logits.max(axis=1, keepdims=True)
        for temperature in self.temperatures:
            exact = (logits - largest) * np.float32(1 / temperature)
            exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
            rebuilt = reconstruct_logprobs(
                targets, self.spec, temperature=temperature, basis=self.basis, tail=tail
            )
            self._add_temperature(self._of(temperature), exact, rebuilt, features)

    def _of(self, temperature: float) -> _Sums:
        if temperature not in self._sums:
            vocab_size = self.spec.vocab_size
            wrong, right = (np.zeros((DIRECTIONS, vocab_size), np.float32) for _ in range(2))
            self._sums[temperature] = _Sums(0.0, 0.0, wrong, right, np.zeros(vocab_size))
        return self._sums[temperature]

    @staticmethod
    def _add_temperature(sums: _Sums, exact: Float32, rebuilt: Float32, features: Float32) -> None:
        p = np.exp(exact)
        exact -= rebuilt
        sums.kl += float(np.multiply(exact, p, out=np.zeros_like(p), where=p > 0).sum(dtype=np.float64))
        difference = np.exp(rebuilt) - p
        sums.variation += float(np.abs(difference).sum(dtype=np.float64)) / 2
        sums.wrong += features.T @ difference
        sums.right += features.T @ p
        sums.mean += p.sum(axis=0, dtype=np.float64)

    def _error(self, sums: _Sums) -> TargetError:
        centred = sums.right - np.outer(self._features, sums.mean / self.tokens)
        gradient = np.linalg.norm(sums.wrong) / max(float(np.linalg.norm(centred)), 1e-30)
        return TargetError(sums.kl / self.tokens, sums.variation / self.tokens, float(gradient))


def directions(width: int) -> Float32:
    """float32 [d, 64]: the random directions, always the same, along which gradients are compared."""
    shape = (width, DIRECTIONS)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def target_error(
    logits: Float32,
    targets: TargetArrays,
    spec: TargetSpec,
    *,
    features: Float32,
    basis: SketchBasis | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Mapping[float, TargetError]:
    """`ErrorMeter` on rows that are all there."""
    meter = ErrorMeter(spec, basis, temperatures)
    meter.add(logits, targets, features)
    return meter.result()
