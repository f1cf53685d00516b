"""Calibration: from sampled tokens to a basis with its map, codebook and measured error; and the drift watch.

Costs two head products and about ten passes over the sampled logits, made again in each pass from the hidden
states (16k tokens of a 135M model on two cores: a minute).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.offline.capture import CoordinateMap, as_numpy, capture
from pmetal_distill.offline.fidelity import TEMPERATURES, ErrorMeter, TargetError
from pmetal_distill.offline.sketch import FittedSketch, Moments, fit_basis_linear, fit_basis_logits
from schemas.arrays import Float32, TargetArrays, TokenRows
from schemas.basis import NO_CEILING, SketchBasis
from schemas.codebook import Codebook
from schemas.codec import Codec, decode, encode
from schemas.errors import UsageError
from schemas.spec import TargetSpec

MARGINS = (NO_CEILING, 0.0, 0.25, 0.5, 0.75, 1.0)
DRIFT_FACTOR = 1.5
_MARGIN_ROWS = 1024
_MARGIN_TEMPERATURES = (1.0, 2.0)


class LinearWeights(Protocol):
    """The parts of a linear head that a fit needs (`models.LinearHead`)."""

    @property
    def weight(self) -> mx.array:
        """[V, d]."""
        ...

    @property
    def bias(self) -> mx.array | None:
        """[V], or None."""
        ...

    @property
    def scale(self) -> float | None:
        """None for 1."""
        ...

    @property
    def softcap(self) -> float | None:
        """None for none; with one the head is not linear."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Sampled tokens whose logits can be had again and again.

    Attributes:
        states: [n, d], final hidden states of trained positions, spread over the data set.
        logits_of: hidden states [m, d] -> logits [m, V]. Where a model cannot be split, `states` are the
            logits themselves and this returns its argument.
        chunk: rows of logits at once.
    """

    states: npt.NDArray[np.float32]
    logits_of: Callable[[mx.array], mx.array]
    chunk: int = 256

    def __len__(self) -> int:
        return len(self.states)

    def chunks(self) -> Iterator[tuple[Float32, Float32]]:
        """(hidden states, logits) of successive rows."""
        for start in range(0, len(self.states), self.chunk):
            states = self.states[start : start + self.chunk]
            yield states, as_numpy(self.logits_of(mx.array(states)))

    def logits(self) -> Iterator[Float32]:
        """The logits alone."""
        return (logits for _, logits in self.chunks())

    def thinned(self, rows: int) -> "Sample":
        """At most `rows` of the rows, evenly spread."""
        if len(self) <= rows:
            return self
        return replace(self, states=self.states[np.linspace(0, len(self) - 1, rows).astype(int)])


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Everything that capture, writer and drift watch need.

    Attributes:
        spec: of the targets.
        basis, codebook: sidecars.
        map: makes coordinates at capture.
        error: per temperature, of stored and rebuilt targets on held-back rows.
        fitted: the basis before rounding.
        moments: of the calibration tokens; None where the head is not linear.
    """

    spec: TargetSpec
    basis: SketchBasis
    codebook: Codebook
    map: CoordinateMap
    error: Mapping[float, TargetError]
    fitted: FittedSketch
    moments: Moments | None


def calibrate(
    sample: Sample,
    held_back: Sample,
    spec: TargetSpec,
    *,
    rank: int,
    step: float,
    head: LinearWeights | None = None,
) -> Calibration:
    """Fits, chooses the ceiling's margin, learns the codebook, measures. Deterministic.

    Args:
        sample: tokens to fit on.
        held_back: tokens of other documents to measure on.
        spec: with tail "sketch".
        rank, step: of the sketch.
        head: the linear head of the teacher; None (or one with a soft-cap) fits on logits.

    Raises:
        UsageError: too few tokens for the rank.
        NonFiniteError: NaN or infinity in the sample.
    """
    if not len(sample) or not len(held_back):
        raise UsageError(
            f"calibration: there must be tokens to fit and to measure on, found {len(sample)} and "
            f"{len(held_back)}; give more text"
        )
    moments = None
    if head is not None and head.softcap is None:
        moments = sum_moments(sample)
    return _finish(sample, held_back, spec, _fit(moments, sample, head, rank), moments, step=step)


def sum_moments(sample: Sample) -> Moments:
    """Moments of all rows of a sample."""
    parts = [Moments.of(hidden, logits) for hidden, logits in sample.chunks()]
    return sum(parts[1:], parts[0])


def measure(
    sample: Sample,
    codec: Codec,
    made: CoordinateMap | None,
    *,
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> dict[float, TargetError]:
    """Errors of a sample's targets, written, read and rebuilt."""
    meter = ErrorMeter(codec.spec, codec.basis, temperatures)
    for hidden, logits in sample.chunks():
        targets = capture(logits, codec.spec, hidden=hidden, sketch=made)
        meter.add(logits, as_stored(targets, codec), hidden)
    return meter.result()


def as_stored(targets: TargetArrays, codec: Codec) -> TargetArrays:
    """What a reader gets of captured targets [n]."""
    n = len(targets.head_ids)
    zeros = np.zeros(n, np.int32)
    table, _ = encode(targets, TokenRows(zeros, zeros, zeros, np.ones(n, np.bool_)), codec)
    return decode(table, codec)[1]


@dataclass(frozen=True, slots=True, eq=False)
class DriftMonitor:
    """Decides whether a stretch of the data set needs a basis of its own.

    A stretch (a fixed range of shards) is judged by a sample of its own tokens against the calibration of the
    whole data set, and refitted on the two pooled in equal parts. The decision and the basis depend on
    nothing else, so that every worker, and a resumed run, comes to the same.

    Attributes:
        calibration: of the whole data set.
        head: as in `calibrate`.
        factor: a stretch has drifted when its error at `temperature` exceeds this many times the
            calibration's.
        temperature: where errors are compared.
    """

    calibration: Calibration
    head: LinearWeights | None
    factor: float = DRIFT_FACTOR
    temperature: float = 2.0

    def drifted(self, error: Mapping[float, TargetError]) -> bool:
        """Whether these errors are out of bounds."""
        usual = self.calibration.error[self.temperature].gradient
        return error[self.temperature].gradient > self.factor * usual

    def choose(self, sample: Sample, held_back: Sample) -> Calibration:
        """The calibration for a stretch: the one there is with this stretch's errors, or a new one.

        Args:
            sample, held_back: tokens of the stretch, of different documents.
        """
        known = self.calibration
        error = measure(
            held_back, Codec(known.spec, known.basis, known.codebook), known.map, temperatures=TEMPERATURES
        )
        kept = replace(known, error=error)
        if not self.drifted(error):
            return kept
        new = self._refit(sample, held_back)
        better = new.error[self.temperature].gradient < error[self.temperature].gradient
        return new if better else kept

    def _refit(self, sample: Sample, held_back: Sample) -> Calibration:
        known = self.calibration
        pooled = None
        if known.moments is not None:
            own = sum_moments(sample)
            pooled = own + known.moments.scaled(own.tokens)
        fitted = _fit(pooled, sample, self.head, known.basis.rank)
        return _finish(sample, held_back, known.spec, fitted, pooled, step=known.basis.step)


def _fit(moments: Moments | None, sample: Sample, head: LinearWeights | None, rank: int) -> FittedSketch:
    if moments is None or head is None:
        return fit_basis_logits(sample.logits, rank=rank)
    return fit_basis_linear(moments, head.weight, rank=rank, bias=head.bias, scale=head.scale)


def _finish(
    sample: Sample,
    held_back: Sample,
    spec: TargetSpec,
    fitted: FittedSketch,
    moments: Moments | None,
    *,
    step: float,
) -> Calibration:
    thinned = sample.thinned(4 * _MARGIN_ROWS)
    captured = [capture(z, spec, hidden=h, sketch=fitted.map) for h, z in thinned.chunks()]
    codebook = Codebook.fit(TargetArrays.concatenate(captured), spec)
    basis = _with_best_margin(sample.thinned(_MARGIN_ROWS), spec, fitted, codebook, step=step)
    error = measure(held_back, Codec(spec, basis, codebook), fitted.map)
    return Calibration(spec, basis, codebook, fitted.map, error, fitted, moments)


def _with_best_margin(
    sample: Sample, spec: TargetSpec, fitted: FittedSketch, codebook: Codebook, *, step: float
) -> SketchBasis:
    """The basis with the margin of least error; the coordinates do not depend on it."""
    plain = fitted.basis(step=step)
    bases = [replace(plain, margin=margin) for margin in MARGINS]
    meters = [ErrorMeter(spec, basis, _MARGIN_TEMPERATURES) for basis in bases]
    codec = Codec(spec, plain, codebook)
    for hidden, logits in sample.chunks():
        targets = as_stored(capture(logits, spec, hidden=hidden, sketch=fitted.map), codec)
        for meter in meters:
            meter.add(logits, targets, hidden)
    scores = [sum(e.gradient for e in meter.result().values()) for meter in meters]
    return bases[int(np.argmin(scores))]
