"""Calibration: from sampled tokens to a basis with its map, codebook and measured error; and the drift watch.

Costs products and a few passes over the logits of at most 13k of the sampled tokens, made again in each pass
from the hidden states (16k tokens of a 135M model on two cores: half a minute). On a GPU those passes run
there; the products of the fit stay in NumPy's float64, on another thread and a float32 copy of the head.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.device import on_gpu
from pmetal_distill.offline.capture import CoordinateMap, as_numpy, capturing
from pmetal_distill.offline.device_fidelity import DeviceErrorMeter, meant_on_device
from pmetal_distill.offline.fidelity import TEMPERATURES, ErrorMeter, TargetError
from pmetal_distill.offline.sample import Sample
from pmetal_distill.offline.sketch import (
    FittedSketch,
    Moments,
    fit_basis_linear,
    fit_basis_logits,
    meant_tokens,
)
from pmetal_distill.steps import Steps, at_once, beside, finish
from pmetal_distill.tail_basis import TailBasis
from schemas.arrays import Float32, Int32, TargetArrays, TokenRows
from schemas.basis import NO_CEILING, SketchBasis, plan_groups
from schemas.codebook import Codebook
from schemas.codec import Codec, decode, encode
from schemas.errors import UsageError
from schemas.predictor import SketchPredictor
from schemas.spec import TargetSpec

MARGINS = (NO_CEILING, 0.0, 0.25, 0.5, 0.75, 1.0)
DRIFT_FACTOR = 1.4
LEAST_GAIN = 0.9
CODING_ROWS, MARGIN_ROWS = 8192, 512
_MEANT_ROWS = 4096
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
class Calibration:
    """Everything that capture, writer and drift watch need.

    Attributes:
        spec: of the targets.
        basis, codebook: sidecars.
        map: makes coordinates at capture.
        error: per temperature, of stored and rebuilt targets on held-back rows.
        fitted: the basis before rounding.
        moments: of the calibration tokens; None where the head is not linear.
        tail: the basis on the device, for measuring; None on the CPU.
    """

    spec: TargetSpec
    basis: SketchBasis
    codebook: Codebook
    map: CoordinateMap
    error: Mapping[float, TargetError]
    fitted: FittedSketch
    moments: Moments | None
    tail: TailBasis | None = None

    def measured(self) -> dict[str, float]:
        """The errors by name, as commit records hold them."""
        return {
            f"{name}@{temperature:g}": getattr(error, name)
            for temperature, error in self.error.items()
            for name in ("gradient", "kl", "total_variation")
        }


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
    return Fitting(sample, held_back, head).calibrate(spec, rank=rank, step=step)


@dataclass(slots=True, eq=False)
class Fitting:
    """What calibrations on the same tokens share: moments, and a fit for each rank. Costs memory for both.

    Args:
        sample, held_back, head: as in `calibrate`.

    Raises:
        UsageError: no tokens.
        NonFiniteError: NaN or infinity in the sample.
    """

    sample: Sample
    held_back: Sample
    head: LinearWeights | None = None
    _moments: Moments | None = field(default=None, init=False)
    _fitted: dict[int, FittedSketch] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not len(self.sample) or not len(self.held_back):
            raise UsageError(
                f"calibration: there must be tokens to fit and to measure on, found {len(self.sample)} and "
                f"{len(self.held_back)}; give more text"
            )
        if self.head is not None and self.head.softcap is None:
            self._moments = sum_moments(self.sample)

    def calibrate(self, spec: TargetSpec, *, rank: int, step: float) -> Calibration:
        """As the function; fits each rank once.

        Raises:
            UsageError: too few tokens for the rank.
        """
        if rank not in self._fitted:
            self._fitted[rank] = finish(fitting_sketch(self._moments, self.sample, self.head, rank))
        fitted = self._fitted[rank]
        return finish(_finishing(self.sample, self.held_back, spec, fitted, self._moments, step=step))


def sum_moments(sample: Sample) -> Moments:
    """Moments of all rows of a sample; what the teacher means, of at most 4096 of them."""
    parts = [_meant(logits) for _, logits in sample.thinned(_MEANT_ROWS).chunks()]
    meant = np.asarray(sum(parts[1:], parts[0]), np.float64)
    return Moments.of(sample.states, len(meant)).meaning(meant)


def measure(
    sample: Sample,
    codec: Codec,
    made: CoordinateMap | None,
    *,
    temperatures: tuple[float, ...] = TEMPERATURES,
    tail: TailBasis | None = None,
) -> dict[float, TargetError]:
    """Errors of a sample's targets, written, read and rebuilt.

    Args:
        sample: rows to measure on.
        codec: that writes and reads them.
        made: makes their coordinates.
        temperatures: where to measure.
        tail: the basis of `codec` on a GPU, if it is there already.
    """
    return finish(measuring(sample, codec, made, temperatures=temperatures, tail=tail))


def measuring(
    sample: Sample,
    codec: Codec,
    made: CoordinateMap | None,
    *,
    temperatures: tuple[float, ...] = TEMPERATURES,
    tail: TailBasis | None = None,
) -> Steps[dict[float, TargetError]]:
    """`measure` in steps."""
    meter = _meter(codec.spec, codec.basis, temperatures, tail=tail)
    for rows, logits, stored in _stored_chunks(sample, codec, made):
        yield
        meter.add(logits, stored(), rows)
    result = meter.later()
    yield
    return result()


def as_stored(targets: TargetArrays, codec: Codec, token_ids: Int32 | None = None) -> TargetArrays:
    """What a reader gets of captured targets [n] at these input ids [n]."""
    n = len(targets.head_ids)
    zeros = np.zeros(n, np.int32)
    ids = zeros if token_ids is None else token_ids
    table, _ = encode(targets, TokenRows(ids, zeros, zeros, np.ones(n, np.bool_)), codec)
    return decode(table, codec)[1]


def _stored_chunks(
    sample: Sample, codec: Codec, made: CoordinateMap | None
) -> Iterator[tuple[Float32, mx.array, Callable[[], TargetArrays]]]:
    """(hidden states, logits, what waits for the targets as a reader gets them) of successive rows."""
    start = 0
    for hidden, logits in sample.chunks():
        captured = capturing(logits, codec.spec, hidden=hidden, sketch=made)
        ids = sample.ids_from(start, len(hidden))
        yield hidden, logits, partial(_as_stored_later, captured, codec, ids)
        start += len(hidden)


def _as_stored_later(captured: Callable[[], TargetArrays], codec: Codec, ids: Int32 | None) -> TargetArrays:
    return as_stored(captured(), codec, ids)


@dataclass(frozen=True, slots=True, eq=False)
class DriftMonitor:
    """Decides whether a stretch of the data set needs a basis of its own.

    A stretch (a fixed range of shards) is judged by a sample of its own tokens against the calibration of the
    whole data set, and refitted on the two pooled in equal parts. The decision and the basis depend on
    nothing else, so that every worker, and a resumed run, comes to the same.

    Attributes:
        calibration: of the whole data set.
        head: as in `calibrate`.
        factor: a stretch has drifted when its KL at `temperature` exceeds this many times the calibration's.
            (KL is a mean over tokens. The gradient's error is not: on 256 tokens it is up to twice that on
            1,024 of the same text.)
        temperature: where errors are compared.
    """

    calibration: Calibration
    head: LinearWeights | None
    factor: float = DRIFT_FACTOR
    temperature: float = 2.0

    def drift(self, error: Mapping[float, TargetError]) -> float:
        """How many times the calibration's KL these errors' is."""
        return self._kl(error) / max(self._kl(self.calibration.error), 1e-30)

    def drifted(self, error: Mapping[float, TargetError]) -> bool:
        """Whether these errors are out of bounds."""
        return self.drift(error) > self.factor

    def errors(self, held_back: Sample) -> Steps[dict[float, TargetError]]:
        """Errors of the calibration that there is, on tokens of other text; in steps."""
        known = self.calibration
        codec = Codec(known.spec, known.basis, known.codebook)
        return (yield from measuring(held_back, codec, known.map, tail=known.tail))

    def choose(self, sample: Sample, held_back: Sample) -> Calibration:
        """The calibration for a stretch: the one there is with this stretch's errors, or a new one.

        Args:
            sample, held_back: tokens of the stretch, of different documents.
        """
        return finish(self.choosing(sample, held_back))

    def choosing(self, sample: Sample, held_back: Sample) -> Steps[Calibration]:
        """`choose` in steps."""
        error = yield from self.errors(held_back)
        kept = replace(self.calibration, error=error)
        if not self.drifted(error):
            return kept
        new = yield from self._refitting(sample, held_back)
        return new if self._kl(new.error) < LEAST_GAIN * self._kl(error) else kept

    def _kl(self, error: Mapping[float, TargetError]) -> float:
        return error[self.temperature].kl

    def _refitting(self, sample: Sample, held_back: Sample) -> Steps[Calibration]:
        known = self.calibration
        pooled = None
        if known.moments is not None:
            own = sum_moments(sample)
            pooled = own + known.moments.scaled(own.tokens)
        yield
        fitted = yield from fitting_sketch(pooled, sample, self.head, known.basis.rank)
        step = known.basis.step
        return (yield from _finishing(sample, held_back, known.spec, fitted, pooled, step=step))


def fitting_sketch(
    moments: Moments | None, sample: Sample, head: LinearWeights | None, rank: int
) -> Steps[FittedSketch]:
    """The basis before it is rounded: from moments and a linear head, else from its logits; in steps.

    Its first coordinates are the basis of a lower rank (exactly so with a linear head). Beside a GPU the fit
    runs on a thread, over a copy of the head in float32.
    """
    if moments is None or head is None:
        return fit_basis_logits(sample.logits, rank=rank)
    weight: Any = head.weight
    bias: Any = head.bias
    if on_gpu():
        weight, bias = (None if part is None else as_numpy(part).copy() for part in (weight, bias))
    fit = partial(fit_basis_linear, moments, weight, rank=rank, bias=bias, scale=head.scale)
    return (yield from (beside if on_gpu() else at_once)(fit))


def _finishing(
    sample: Sample,
    held_back: Sample,
    spec: TargetSpec,
    fitted: FittedSketch,
    moments: Moments | None,
    *,
    step: float,
) -> Steps[Calibration]:
    thinned = sample.thinned(CODING_ROWS)
    captured = thinned.captured(spec, fitted.map)
    code = partial(_coded, spec, fitted, captured, thinned.token_ids, step=step)
    codec = yield from (beside if on_gpu() else at_once)(code)
    basis, tail = with_best_margin(sample.thinned(MARGIN_ROWS), codec, fitted.map)
    yield
    codec = replace(codec, basis=basis)
    error = yield from measuring(held_back, codec, fitted.map, tail=tail)
    assert codec.codebook is not None
    return Calibration(spec, basis, codec.codebook, fitted.map, error, fitted, moments, tail)


def _coded(
    spec: TargetSpec, fitted: FittedSketch, captured: TargetArrays, ids: Int32 | None, *, step: float
) -> Codec:
    """Codebook, predictor and groups."""
    basis = with_predictor(fitted.basis(step=step), captured, ids)
    return Codec(spec, basis, Codebook.fit(captured, spec))


def with_predictor(basis: SketchBasis, captured: TargetArrays, token_ids: Int32 | None) -> SketchBasis:
    """The basis with a predictor fitted on the captured tokens, and groups that suit what it leaves."""
    if token_ids is None:
        return basis
    fitted = SketchPredictor.fit(basis.components, captured.coordinates, token_ids, captured.head_ids)
    predicting = basis.with_predictor(fitted)
    spread = predicting.residual_spread(captured.coordinates, token_ids, captured.head_ids)
    return predicting.with_groups(plan_groups(spread, basis.step))


def with_best_margin(
    sample: Sample, codec: Codec, made: CoordinateMap
) -> tuple[SketchBasis, TailBasis | None]:
    """The basis of `codec` with the margin of least error; the coordinates do not depend on it.

    On a GPU also as it is on the device. Memory: the sample's logits, and the sums of one margin at a time.
    """
    assert codec.basis is not None
    bases = [codec.basis.with_margin(margin) for margin in MARGINS]
    tails = TailBasis.with_margins(codec.basis, MARGINS) if on_gpu() else [None] * len(bases)
    chunks = [(rows, logits, stored()) for rows, logits, stored in _stored_chunks(sample, codec, made)]
    scores = []
    for basis, tail in zip(bases, tails, strict=True):
        meter = _meter(codec.spec, basis, _MARGIN_TEMPERATURES, tail=tail)
        for rows, logits, targets in chunks:
            meter.add(logits, targets, rows)
        scores.append(sum(e.gradient for e in meter.result().values()))
    best = int(np.argmin(scores))
    return bases[best], tails[best]


def _meter(
    spec: TargetSpec,
    basis: SketchBasis | None,
    temperatures: tuple[float, ...],
    *,
    tail: TailBasis | None = None,
) -> ErrorMeter | DeviceErrorMeter:
    if basis is None or not on_gpu():
        return ErrorMeter(spec, basis, temperatures)
    return DeviceErrorMeter(spec, tail or TailBasis.from_sketch(basis), temperatures)


def _meant(logits: mx.array) -> npt.NDArray[np.float64]:
    return meant_on_device(logits) if on_gpu() else meant_tokens(as_numpy(logits))
