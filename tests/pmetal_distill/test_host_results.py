"""Copies of arrays where the memory is shared; with a kernel: tests/kernels/test_to_host.py."""

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.host_results import HostCopy, to_numpy


@pytest.mark.parametrize("dtype", [mx.float32, mx.int32, mx.float16, mx.bfloat16])
def test_the_copy_is_equal_and_independent(dtype):
    array = (mx.arange(20_000) % 128).astype(dtype).reshape(100, 200)[::2]
    found = to_numpy(array)
    np.testing.assert_array_equal(found, (np.arange(20_000) % 128).reshape(100, 200)[::2])
    found[:] = 0
    assert mx.abs(array).sum().item() > 0


def test_an_empty_array_is_copied_too():
    assert to_numpy(mx.zeros((0, 5))).shape == (0, 5)


def test_waiting_first_and_twice_changes_nothing():
    copy = HostCopy(mx.arange(9))
    copy.wait()
    copy.wait()
    np.testing.assert_array_equal(copy.take(), np.arange(9))
