"""Sums over hidden states and their gradients, under the emulation, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.kernels import engaged, hidden_sums
from tests.kernels import tools
from tests.kernels.host.builder import Schedule


def _loss(s: mx.array, t: mx.array) -> mx.array:
    weights = (tools.vector(len(s), seed) for seed in range(4))
    return sum(((w * x).sum() for w, x in zip(weights, hidden_sums(s, t), strict=True)), mx.array(0.0))


@pytest.mark.parametrize("dtype", tools.DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 577, 4096])
def test_sums_and_gradients_equal_float64(width: int, dtype: mx.Dtype) -> None:
    n = 11
    s, t = tools.logits(n, width, dtype, scale=1.0), tools.logits(n, width, mx.float32, seed=5, scale=1.0)
    a, b = tools.float64(s), tools.float64(t)
    w = [tools.float64(tools.vector(n, seed))[:, None] for seed in range(4)]
    by_s = 2 * w[0] * (a - b) + w[1] * b + 2 * w[2] * a
    by_t = 2 * w[0] * (b - a) + w[1] * a + 2 * w[3] * b
    for schedule, shape in zip(tools.SCHEDULES, tools.SHAPES, strict=True):
        with tools.emulated(schedule, shape):
            sums = hidden_sums(s, t)
            ds, dt = mx.grad(_loss, (0, 1))(s, t)
            mx.eval(sums, ds, dt)
        for found, wanted in zip(sums, ((a - b) ** 2, a * b, a**2, b**2), strict=True):
            tools.assert_close(found, wanted.sum(-1), 3e-6, f"{schedule}")
        tools.assert_gradient(ds, by_s, f"{schedule}")
        tools.assert_gradient(dt, by_t, f"{schedule}")


def test_plain_operations_give_the_same() -> None:
    s, t = tools.logits(5, 96, mx.float32), tools.logits(5, 96, mx.float32, seed=5)
    plain = hidden_sums(s, t)
    assert not engaged()
    with tools.emulated(Schedule(2, None)):
        emulated = hidden_sums(s, t)
        mx.eval(emulated)
    assert engaged() == {"feature_sums": 1}
    for a, b in zip(plain, emulated, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-6)
