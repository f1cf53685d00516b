"""Coordinates less what ids predict: the kernel under the emulation against plain operations and NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.kernels import dispatch, engaged
from pmetal_distill.kernels.take_off import take_off
from tests.kernels.host.builder import host_kernel

HOST = dispatch.Platform("cuda", host_kernel, "")


@pytest.mark.parametrize("rank", [2, 12, 128, 301, 1024])
@pytest.mark.parametrize("k", [1, 16, 64])
def test_the_kernel_and_plain_operations_equal_the_sums(rank: int, k: int) -> None:
    rng = np.random.default_rng(rank + k)
    tables = rng.integers(-32767, 32768, (2, 50, rank)).astype(np.int16)  # most sums wrap around
    ids, tokens = rng.integers(0, 50, (9, k)).astype(np.int32), rng.integers(0, 50, 9).astype(np.int32)
    y = rng.normal(size=(9, rank)).astype(np.float32)
    sums = (tables[0][tokens].astype(np.int64) + tables[1][ids].sum(axis=1, dtype=np.int64)).astype(np.int16)
    expected = y - sums * np.float32(0.25)

    def run() -> np.ndarray:
        given = {"token_table": mx.array(tables[0]), "head_table": mx.array(tables[1])}
        return np.array(take_off(mx.array(y), mx.array(tokens), mx.array(ids), **given, unit=0.25))

    plain = run()
    with dispatch.using(HOST):
        fused = run()
    np.testing.assert_allclose(plain, expected, rtol=1e-6)
    np.testing.assert_allclose(fused, expected, rtol=1e-6)
    assert engaged() == ({} if rank % 2 else {"take_off": 1})


def test_no_tokens_need_no_kernel() -> None:
    table = mx.zeros((5, 3), mx.int16)
    with dispatch.using(HOST):
        found = take_off(
            mx.zeros((0, 3)),
            mx.zeros((0,), mx.int32),
            mx.zeros((0, 4), mx.int32),
            token_table=table,
            head_table=table,
            unit=1.0,
        )
    assert found.shape == (0, 3)
    assert not engaged()
