"""`fidelity` and `sketch.meant_tokens` on a GPU: passes over logits that never leave it.

Float32 throughout, where NumPy adds up in float64: figures agree to about 1e-3. Memory: some arrays of
[rows, V] for the rows of one call, and 2 x 64 x V floats a temperature.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.host_inputs import to_device
from pmetal_distill.host_results import HostCopy
from pmetal_distill.offline.fidelity import DIRECTIONS, TEMPERATURES, TargetError, directions
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TeacherTarget
from schemas.arrays import Float32, TargetArrays
from schemas.errors import NonFiniteError
from schemas.spec import TargetSpec


class DeviceErrorMeter:
    """An `ErrorMeter` for tail "sketch" whose arrays are on the device.

    Args:
        spec: of the targets.
        tail: the sketch's basis.
        temperatures: where to measure.
    """

    def __init__(
        self, spec: TargetSpec, tail: TailBasis, temperatures: Sequence[float] = TEMPERATURES
    ) -> None:
        self._spec = spec
        self._tail = tail
        self._tokens = 0
        self._features = mx.zeros((DIRECTIONS,))
        self._sums = {t: _Sums(spec.vocab_size) for t in temperatures}

    def add(self, logits: mx.array, targets: TargetArrays, features: Float32) -> None:
        """Counts rows in; see `ErrorMeter.add`."""
        projected = to_device(np.asarray(features, np.float32) @ directions(features.shape[1]))
        target = TeacherTarget.from_arrays(targets, self._spec, bases=[self._tail])
        shifted = logits.astype(mx.float32)
        shifted = shifted - shifted.max(axis=-1, keepdims=True)
        self._tokens += len(logits)
        self._features = self._features + projected.sum(axis=0)
        for temperature, sums in self._sums.items():
            exact = shifted * (1 / temperature)
            exact = exact - mx.logsumexp(exact, axis=-1, keepdims=True)
            sums.add(exact, target.at(temperature).rows(), projected)
        mx.async_eval(self._features, [sums.arrays() for sums in self._sums.values()])

    def result(self) -> dict[float, TargetError]:
        """Errors per temperature; empty before any row."""
        return self.later()()

    def later(self) -> Callable[[], dict[float, TargetError]]:
        """Queues what `result` needs; the function returned waits for it."""
        if not self._tokens:
            return dict
        tokens = self._tokens
        copy = HostCopy(mx.stack([sums.totals(self._features, tokens) for sums in self._sums.values()]))
        return lambda: {
            t: TargetError(kl / tokens, variation / tokens, wrong / max(right, 1e-30))
            for t, (kl, variation, wrong, right) in zip(self._sums, copy.take().tolist(), strict=True)
        }


class _Sums:
    def __init__(self, vocab_size: int) -> None:
        self._kl, self._variation = mx.array(0.0), mx.array(0.0)
        self._wrong, self._right = mx.zeros((DIRECTIONS, vocab_size)), mx.zeros((DIRECTIONS, vocab_size))
        self._mean = mx.zeros((vocab_size,))

    def arrays(self) -> list[mx.array]:
        return [self._kl, self._variation, self._wrong, self._right, self._mean]

    def add(self, exact: mx.array, rebuilt: mx.array, features: mx.array) -> None:
        p = mx.exp(exact)
        difference = mx.exp(rebuilt) - p
        self._kl = self._kl + mx.where(p > 0, p * (exact - rebuilt), 0.0).sum(axis=-1).sum()
        self._variation = self._variation + mx.abs(difference).sum(axis=-1).sum() / 2
        self._wrong = self._wrong + features.T @ difference
        self._right = self._right + features.T @ p
        self._mean = self._mean + p.sum(axis=0)

    def totals(self, features: mx.array, tokens: int) -> mx.array:
        """KL, total variation and the norms of the wrong and the right part of the gradient, float32 [4]."""
        centred = self._right - features[:, None] * (self._mean / tokens)
        norms = [mx.sqrt(a.square().sum(axis=-1).sum()) for a in (self._wrong, centred)]
        return mx.stack([self._kl, self._variation, *norms])


def meant_on_device(logits: mx.array) -> npt.NDArray[np.float64]:
    """`sketch.meant_tokens` of logits [n, V] that are on the device.

    Raises:
        NonFiniteError: NaN or infinity in a row.
    """
    z = logits.astype(mx.float32)
    soft = [mx.softmax(z * (1 / temperature), axis=-1, precise=True) for temperature in (2, 4)]
    found = np.array((soft[0] + soft[1]).sum(axis=0), np.float64)
    if not np.isfinite(found).all():
        raise NonFiniteError(
            "calibration: logits must be finite, found NaN or infinity; "
            "see that the teacher's weights are whole and that it runs in a wide enough type"
        )
    return found
