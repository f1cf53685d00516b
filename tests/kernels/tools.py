"""What kernel tests share: the emulation as a platform, inputs, and float64 references."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from pmetal_distill.kernels import dispatch, tuning
from tests.kernels.host.builder import Schedule, host_kernel

VOCABULARIES = (7, 1023, 1025, 32000, 49152, 128256, 151936)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SCHEDULES = (Schedule(0, 0), Schedule(1, None), Schedule(2, 1), Schedule(3, 3))
SHAPES = (tuning.Shape(32, 1), tuning.Shape(96, 2), tuning.Shape(256, 1), tuning.Shape(1024, 2))
GRAIN = {mx.float32: 2e-6, mx.float16: 6e-4, mx.bfloat16: 5e-3}

_schedule = [Schedule()]


def _make(**arguments: Any) -> Callable[..., list[mx.array]]:
    return host_kernel(**arguments, schedule=lambda: _schedule[0])


HOST = dispatch.Platform("host", _make, "")


@contextmanager
def emulated(
    schedule: Schedule = SCHEDULES[0], shape: tuning.Shape | None = None, make: Any = None
) -> Iterator[None]:
    """Runs kernels under the emulation, in this order and launch shape."""
    _schedule[0] = schedule
    given = HOST if make is None else dispatch.Platform("host", make, "")
    with dispatch.using(given):
        if shape is None:
            yield
        else:
            with tuning.using(shape):
                yield


def rows_for(vocab: int) -> int:
    """Few rows for large vocabularies."""
    return 9 if vocab < 2000 else 2


def logits(rows: int, vocab: int, dtype: mx.Dtype, seed: int = 0, scale: float = 4.0) -> mx.array:
    """Normal logits."""
    values = np.random.default_rng([seed, rows, vocab]).standard_normal((rows, vocab)) * scale
    return mx.array(values.astype(np.float32)).astype(dtype)


def head_ids(rows: int, vocab: int, k: int, seed: int = 1) -> mx.array:
    """Distinct random ids, int32 [rows, k]."""
    rng = np.random.default_rng([seed, rows, vocab])
    ids = [rng.permutation(vocab)[:k] for _ in range(rows)]
    return mx.array(np.array(ids, np.int32).reshape(rows, k))


def labels(rows: int, vocab: int, ids: mx.array) -> mx.array:
    """Random labels: the first in the head (if there is one), the second missing."""
    found = np.random.default_rng([2, rows, vocab]).integers(0, vocab, rows).astype(np.int32)
    if ids.shape[-1]:
        found[0] = np.array(ids)[0, -1]
    found[1:2] = -100
    return mx.array(found)


def vector(rows: int, seed: int, *more: int) -> mx.array:
    """Normal numbers, float32."""
    return mx.array(np.random.default_rng(seed).standard_normal((rows, *more)).astype(np.float32))


def float64(array: mx.array) -> Any:
    """A NumPy copy in double precision."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def outside(values: Any, ids: Any) -> Any:
    """float64 copy of [n, V] with -inf at the ids."""
    z = values.copy()
    np.put_along_axis(z, ids, -np.inf, -1)
    return z


def logsumexp(x: Any) -> Any:
    """Over the last axis; rows hold at least one finite number."""
    top = x.max(-1, keepdims=True)
    return np.log(np.exp(x - top).sum(-1)) + top[:, 0]


def assert_close(found: mx.array, wanted: Any, bound: float, what: str = "") -> None:
    """Largest difference at most `bound` times the larger of 1 and the largest wanted number; NaN fails."""
    error = np.abs(float64(found) - wanted).max(initial=0.0)
    assert error <= bound * max(1.0, np.abs(wanted).max(initial=0.0)), f"{what}: off by {error}"


def assert_gradient(found: mx.array, wanted: Any, what: str = "") -> None:
    """Each entry right within the rounding of the array's type, relative to its row."""
    scale = np.abs(wanted).max(axis=-1, keepdims=True) + 1e-30
    error = (np.abs(float64(found) - wanted) / scale).max(initial=0.0)
    assert error <= GRAIN[found.dtype], f"{what}: off by {error} of the row's largest entry"
