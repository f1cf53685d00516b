"""Head and tail curve of rows of logits in NumPy, one row at a time. About 0.1 ms a row of 49,152.

A row and its scratch stay in the processor's second-level cache through all passes.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pmetal_distill.kernels.capture import grid_of
from schemas.arrays import Float32, Int32
from schemas.errors import NonFiniteError
from schemas.spec import TargetSpec

_GROUP = 64
_NEVER = np.float32(-1e30)


class RowCapture:
    """Captures rows with the scratch memory of one thread.

    Args:
        spec: k and curve nodes.
    """

    def __init__(self, spec: TargetSpec) -> None:
        self._spec = spec
        grid, powers = grid_of(spec.curve_nodes) if spec.num_nodes else (0, ())
        self._grid, self._powers = grid, powers
        self._scratch = np.empty((8, spec.vocab_size), np.float32)
        self._ones = np.ones(spec.vocab_size, np.float32)

    def rows(
        self, logits: npt.NDArray[np.float32], *, place: Callable[[int], str] = "capture row {}".format
    ) -> tuple[Int32, Float32, Float32]:
        """Head ids [n, k], head log-probabilities [n, k] and curve [n, m] of logits [n, V].

        Args:
            logits: of the rows.
            place: number of a row -> its name for messages.

        Raises:
            NonFiniteError: NaN or infinity in a row.
        """
        spec, n = self._spec, len(logits)
        ids = np.empty((n, spec.k), np.int32)
        scores = np.empty((n, spec.k), np.float32)
        curve = np.empty((n, spec.num_nodes), np.float32)
        total = np.empty(n, np.float64)
        for i, row in enumerate(logits):
            top = top_ids(row, min(spec.k + 1, spec.vocab_size))
            if not _is_finite(row):
                raise non_finite(place(i))
            ids[i] = top[: spec.k]
            scores[i] = row[ids[i]]
            if spec.num_nodes:
                curve[i] = self._curve(row, ids[i], row[top[-1]])
            else:
                total[i] = self._log_total(row, row[top[0]])
        if spec.num_nodes:
            total = _log_total_of(scores, curve[:, spec.curve_nodes.index(1.0)])
        return ids, (scores - total[:, None]).astype(np.float32), curve

    def _log_total(self, row: Float32, largest: np.float32) -> float:
        shifted = np.subtract(row, largest, out=self._scratch[0])
        return float(largest) + float(np.log(np.exp(shifted, out=shifted).sum()))

    def _curve(self, row: Float32, head: Int32, largest: np.float32) -> npt.NDArray[np.float64]:
        """A at the nodes; `largest` is the largest tail logit, from which exponentials cannot overflow."""
        shifted, work = self._scratch[0], self._scratch[1]
        np.subtract(row, largest, out=shifted)
        shifted[head] = _NEVER
        nodes = np.array(self._spec.curve_nodes)
        if self._grid:
            sums = self._power_sums(shifted)
        else:
            sums = [
                float(np.exp(np.multiply(shifted, np.float32(b), out=work), out=work).sum()) for b in nodes
            ]
        return np.log(sums) + nodes * (float(largest) - float(row[head[-1]]))

    def _power_sums(self, shifted: Float32) -> list[float]:
        """Sums of exp(shifted)^(p / grid) for all powers p, by squaring one exponential."""
        shifted *= np.float32(1 / self._grid)
        squares = [np.exp(shifted, out=shifted)]
        for bit in range(1, (max(self._powers) - 1).bit_length()):
            squares.append(np.square(squares[-1], out=self._scratch[bit]))
        return [self._power_sum([squares[bit] for bit in _bits(p, len(squares))]) for p in self._powers]

    def _power_sum(self, factors: list[Float32]) -> float:
        if len(factors) == 1:
            factors = [*factors, self._ones]
        product = factors[0]
        for factor in factors[1:-1]:
            product = np.multiply(product, factor, out=self._scratch[-1])
        return float(np.dot(product, factors[-1]))


def non_finite(place: str) -> NonFiniteError:
    """The error of a row of logits that is not finite."""
    return NonFiniteError(
        f"{place}: logits must be finite, found NaN or infinity; "
        "see that the teacher's weights are whole and that it runs in a wide enough type"
    )


def top_ids(row: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` largest of a row, descending, ties by lower index. About one read.

    Every one of them is at least the count-th largest of the maxima of disjoint groups, which leaves few
    candidates. NaN, if there is any, comes first.
    """
    width = min(_GROUP, len(row) // (2 * count))
    if width < 2:
        return _ordered(row, np.arange(len(row)))[:count]
    span = len(row) // width
    groups = row[: width * span].reshape(width, span)
    maxima = groups.max(axis=0)
    threshold = np.partition(maxima, span - count)[span - count]
    columns = np.flatnonzero(~(maxima < threshold))
    inside = (columns[:, None] + span * np.arange(width)).ravel()
    candidates = np.concatenate([inside, np.arange(width * span, len(row))])
    return _ordered(row, candidates[~(row[candidates] < threshold)])[:count]


def _bits(power: int, count: int) -> list[int]:
    """Exponents e < count, at most twice each, whose 2^e add up to `power`."""
    bits = [bit for bit in range(count) if power >> bit & 1]
    return [*bits, count - 1, count - 1] if power >> count else bits


def _is_finite(row: npt.NDArray[np.float32]) -> bool:
    """One product finds NaN and infinity; only a sum of squares that overflows needs a second look."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(row, row)) or np.isfinite(row).all())


def _ordered(row: npt.NDArray[np.float32], candidates: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    values = row[candidates]
    return candidates[np.lexsort((candidates, -values, ~np.isnan(values)))]


def _log_total_of(scores: Float32, at_one: Float32) -> npt.NDArray[np.float64]:
    """log sum exp of all logits from those of the head [n, k] and A(1) [n]."""
    exact = scores.astype(np.float64)
    head = np.exp(exact - exact[:, :1]).sum(axis=1)
    return np.asarray(exact[:, 0] + np.log(head + np.exp(exact[:, -1] - exact[:, 0] + at_one)), np.float64)
