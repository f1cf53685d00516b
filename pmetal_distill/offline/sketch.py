"""Fits the sketch: weighted PCA of teacher logits in bounded memory, in hidden space for linear heads.

The metric weighs a token j by how often the teacher means it, the mean of p_j at T=2 and T=4, and ignores
what softmax ignores, a constant added to a row. With a linear head z = W h, the PCA of z is that of h in the
metric of the centred W: d x d moments of any number of tokens, and one pass over W. Without one: a randomised
range finder on the rows of logits themselves, two passes and a power iteration over them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pmetal_distill.offline.capture import CoordinateMap, Rows, as_numpy
from schemas.arrays import Float32
from schemas.basis import NO_CEILING, SketchBasis, plan_groups
from schemas.errors import NonFiniteError, UsageError

Float64 = npt.NDArray[np.float64]
_FLOOR = 0.01
_OVERSAMPLE = 32
_ROWS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What a linear fit needs to know of calibration tokens. Adds up; memory d x d + V doubles.

    Attributes:
        tokens: how many, a weight.
        total: float64 [d], sum of hidden states.
        outer: float64 [d, d], sum of their outer products.
        meant: float64 [V], sum of the teacher's probabilities at T=2 and T=4.
    """

    tokens: float
    total: Float64
    outer: Float64
    meant: Float64

    @staticmethod
    def of(hidden: Rows, vocab_size: int) -> "Moments":
        """Of hidden states [n, d]; what the teacher means is added by `meaning`.

        Raises:
            NonFiniteError: NaN or infinity in a row.
        """
        rows = as_numpy(hidden)
        require_finite(rows, "hidden states")
        exact = rows.astype(np.float64)
        return Moments(len(rows), exact.sum(axis=0), exact.T @ exact, np.zeros(vocab_size))

    def meaning(self, meant: Float64) -> "Moments":
        """The same hidden states with `meant_tokens` of some of their logits, brought to their weight."""
        return replace(self, meant=meant * (2 * self.tokens / meant.sum()))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.tokens + other.tokens,
            self.total + other.total,
            self.outer + other.outer,
            self.meant + other.meant,
        )

    def scaled(self, tokens: float) -> "Moments":
        """The same distribution with the weight of `tokens` tokens."""
        ratio = tokens / self.tokens
        return Moments(tokens, self.total * ratio, self.outer * ratio, self.meant * ratio)

    @property
    def mean(self) -> Float64:
        """float64 [d]."""
        return self.total / self.tokens

    @property
    def covariance(self) -> Float64:
        """float64 [d, d]."""
        return self.outer / self.tokens - np.outer(self.mean, self.mean)


@dataclass(frozen=True, slots=True, eq=False)
class FittedSketch:
    """A basis before it is rounded, and the map that makes its coordinates.

    Attributes:
        mean: float32 [V].
        components: float32 [V, r], by falling spread.
        map: from hidden states or logits to coordinates.
        spread: float64 [r], standard deviations of the coordinates over the calibration tokens.
        tokens: calibration tokens.
    """

    mean: Float32
    components: Float32
    map: CoordinateMap
    spread: Float64
    tokens: int

    def basis(self, *, step: float, margin: float = NO_CEILING) -> SketchBasis:
        """The sidecar.

        Args:
            step: quantization step; the mean weight of the metric is 1, so it is in nats of a typical token.
            margin: of the ceiling (`schemas.tail`).
        """
        meta = {"tokens": str(self.tokens)}
        return SketchBasis(self.mean, self.components, step, plan_groups(self.spread, step), meta, margin)

    def truncated(self, rank: int) -> "FittedSketch":
        """The first `rank` coordinates."""
        kept = replace(self.map, projection=self.map.projection[:rank], offset=self.map.offset[:rank])
        return replace(self, components=self.components[:, :rank], map=kept, spread=self.spread[:rank])


def fit_basis_linear(
    moments: Moments,
    weight: Rows,
    *,
    rank: int,
    bias: Rows | None = None,
    scale: float | None = None,
    chunk: int = 8192,
) -> FittedSketch:
    """The basis of a linear head, logits = scale * (hidden @ weight.T + bias), from moments of hidden
    states.

    Args:
        moments: of the calibration tokens.
        weight: [V, d], any float type; converted `chunk` rows at a time.
        rank: r.
        bias: [V], or None.
        scale: of the products and the bias, as in `modelling.heads`; None for 1.
        chunk: rows of `weight` in float32 at once.

    Raises:
        UsageError: fewer calibration tokens, hidden dimensions or vocabulary entries than `rank`.
    """
    vocab_size, width = weight.shape
    check_linear_rank(rank, hidden_size=width, vocab_size=vocab_size)
    _check_tokens(rank, moments.tokens)
    importance = metric(moments.meant)
    pieces = [slice(a, min(a + chunk, vocab_size)) for a in range(0, vocab_size, chunk)]
    factor = 1.0 if scale is None else float(scale)
    centre, gram = _weighted_moments(weight, importance, pieces, factor)
    root, inverse = _roots(gram)
    variances, axes = np.linalg.eigh(root @ moments.covariance @ root)
    axes, variances = axes[:, ::-1][:, :rank], variances[::-1][:rank].clip(min=0.0)
    projection = axes.T @ root
    back = (inverse @ axes).astype(np.float32)
    mean, components = np.empty(vocab_size, np.float32), np.empty((vocab_size, rank), np.float32)
    for rows in pieces:
        centred = as_numpy(weight[rows]) * np.float32(factor) - centre.astype(np.float32)
        mean[rows] = centred @ moments.mean.astype(np.float32)
        components[rows] = centred @ back
    if bias is not None:
        mean += np.float32(factor) * as_numpy(bias)
    made = CoordinateMap(
        "hidden", projection.astype(np.float32), (-projection @ moments.mean).astype(np.float32)
    )
    return FittedSketch(mean, components, made, np.sqrt(variances), int(moments.tokens))


def _weighted_moments(
    weight: Rows, importance: Float64, pieces: list[slice], factor: float
) -> tuple[Float64, Float64]:
    """Weighted mean [d] of the rows of factor * weight, and the weighted sum of outer products around it."""
    width = weight.shape[1]
    centre: Float64 = np.zeros(width)
    gram: Float64 = np.zeros((width, width))
    for rows in pieces:
        part = as_numpy(weight[rows]).astype(np.float64) * factor
        share = importance[rows]
        centre += np.asarray(share @ part, np.float64) / importance.sum()
        gram += np.asarray((part * share[:, None]).T @ part, np.float64)
    gram -= importance.sum() * np.outer(centre, centre)
    return centre, gram


def fit_basis_logits(
    chunks: Callable[[], Iterable[Float32]], *, rank: int, iterations: int = 2, seed: int = 0
) -> FittedSketch:
    """The basis from logits alone, for soft-capped and unknown heads. Memory: V x (r + 32) floats, twice.

    Args:
        chunks: called once a pass; gives the same rows of logits [n, V] every time.
        rank: r.
        iterations: passes that sharpen the range; two more passes find the moments and the axes.
        seed: of the random start.

    Raises:
        UsageError: fewer calibration tokens or vocabulary entries than `rank`.
        NonFiniteError: NaN or infinity in a row.

    References:
        Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4.
    """
    tokens, total, meant = _logit_totals(chunks)
    vocab_size = len(total)
    _check_largest(rank, vocab_size - 1, "the vocabulary")
    _check_tokens(rank, tokens)
    importance = metric(meant)
    root, share = np.sqrt(importance).astype(np.float32), (importance / importance.sum()).astype(np.float32)
    mean = total / tokens
    mean = (mean - share @ mean).astype(np.float32)

    def rows() -> Iterable[Float32]:
        for logits in chunks():
            centred = logits - (logits @ share)[:, None]
            centred -= mean
            centred *= root
            yield centred

    width = min(rank + _OVERSAMPLE, vocab_size)
    axes = np.random.default_rng(seed).standard_normal((vocab_size, width)).astype(np.float32)
    for _ in range(iterations):
        axes = _sharpened(rows(), axes)
    variances, turn = np.linalg.eigh(_gram(rows(), axes) / tokens)
    axes = axes @ turn[:, ::-1][:, :rank].astype(np.float32)
    spread = np.sqrt(variances[::-1][:rank].clip(min=0.0))
    return FittedSketch(mean, axes / root[:, None], _map_of_logits(axes, root, share, mean), spread, tokens)


def _map_of_logits(axes: Float32, root: Float32, share: Float32, mean: Float32) -> CoordinateMap:
    """Coordinates of logits along orthonormal axes of the centred and weighted ones."""
    weighted = axes * root[:, None]
    projection = (weighted - np.outer(share, weighted.sum(axis=0))).T
    offset = -np.asarray(projection @ mean, np.float32)
    return CoordinateMap("logits", np.ascontiguousarray(projection), offset)


def _sharpened(rows: Iterable[Float32], axes: Float32) -> Float32:
    """One power iteration: an orthonormal basis of rows.T @ rows @ axes."""
    found = np.zeros_like(axes)
    for centred in rows:
        found += centred.T @ (centred @ axes)
    return np.asarray(np.linalg.qr(found)[0], np.float32)


def _gram(rows: Iterable[Float32], axes: Float32) -> Float64:
    """Second moments [w, w] of the coordinates of rows along axes [V, w], summed."""
    gram: Float64 = np.zeros((axes.shape[1], axes.shape[1]))
    for centred in rows:
        inner = (centred @ axes).astype(np.float64)
        gram += np.asarray(inner.T @ inner, np.float64)
    return gram


def metric(meant: Float64) -> Float64:
    """Weights of the vocabulary, float64 [V], mean 1, none below one percent."""
    share = meant / meant.sum() * len(meant)
    return np.asarray((share + _FLOOR) / (1 + _FLOOR), np.float64)


def meant_tokens(logits: Float32) -> Float64:
    """float64 [V]: sum over rows [n, V] of softmax at T=2 plus softmax at T=4."""
    found = np.zeros(logits.shape[1])
    for start in range(0, len(logits), _ROWS):
        block = logits[start : start + _ROWS]
        soft = np.exp((block - block.max(axis=1, keepdims=True)) * np.float32(0.25))
        require_finite(soft, "logits")
        for powers in (soft, np.square(soft)):
            found += (1 / powers.sum(axis=1, dtype=np.float64)).astype(np.float32) @ powers
    return found


def _logit_totals(chunks: Callable[[], Iterable[Float32]]) -> tuple[int, Float64, Float64]:
    tokens = 0
    total: Float64 | None = None
    meant: Float64 | None = None
    for logits in chunks():
        tokens += len(logits)
        part, soft = logits.sum(axis=0, dtype=np.float64), meant_tokens(logits)
        total, meant = (part, soft) if total is None or meant is None else (total + part, meant + soft)
    if total is None or meant is None:
        raise UsageError("calibration: there must be tokens to fit the sketch on, found none; give more text")
    return tokens, total, meant


def _roots(gram: Float64) -> tuple[Float64, Float64]:
    """Square root of a symmetric matrix and the inverse of it, where it has one."""
    values, axes = np.linalg.eigh(gram)
    values = np.sqrt(values.clip(min=values[-1] * 1e-12))
    return (axes * values) @ axes.T, (axes / values) @ axes.T


def check_linear_rank(rank: int, *, hidden_size: int, vocab_size: int) -> None:
    """Refuses a rank that no sketch of a teacher with a linear head can have.

    Raises:
        UsageError: with what it may be.
    """
    _check_largest(rank, min(hidden_size, vocab_size - 1), "the hidden size")


def _check_largest(rank: int, largest: int, what: str) -> None:
    if rank > largest:
        raise UsageError(
            f"sketch rank: must be at most {largest}, {what} of this teacher, found {rank}; "
            "give a smaller --sketch-rank"
        )


def _check_tokens(rank: int, tokens: float) -> None:
    if tokens < rank:
        raise UsageError(
            f"calibration: tokens must be at least the sketch rank {rank}, found {tokens:g}; "
            "give more text, more calibration tokens or a smaller rank"
        )


def require_finite(rows: Float32, what: str) -> None:
    """Raises NonFiniteError unless all of [n, ...] is finite; `what` is its name."""
    ok = np.isfinite(rows).all(axis=1)
    if not ok.all():
        raise NonFiniteError(
            f"calibration row {int(ok.argmin())} of its chunk: {what} must be finite, found NaN or infinity; "
            "see that the teacher's weights are whole and that it runs in a wide enough type"
        )
