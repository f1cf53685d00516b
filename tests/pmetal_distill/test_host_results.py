"""Copies of device arrays, and the advice to the CUDA driver (against a stand-in: no GPU here)."""

import ctypes

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill import host_results
from pmetal_distill.host_results import to_numpy


class Driver:
    """Answers like libcuda; remembers the advice."""

    def __init__(self, *, managed: bool, status: int = 0) -> None:
        self.managed, self.status, self.advice = managed, status, []

    def cuPointerGetAttribute(self, out, attribute, address):
        assert attribute.value == 8
        assert address.value
        ctypes.cast(out, ctypes.POINTER(ctypes.c_uint32))[0] = self.managed
        return self.status

    def cuMemAdvise(self, address, size, advice, place):
        self.advice.append((address.value, size.value, advice.value, place.value))
        return 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.int32, mx.float16, mx.bfloat16])
def test_the_copy_is_equal_and_independent(dtype):
    array = (mx.arange(20_000) % 128).astype(dtype).reshape(100, 200)[::2]
    found = to_numpy(array)
    np.testing.assert_array_equal(found, (np.arange(20_000) % 128).reshape(100, 200)[::2])
    found[:] = 0
    assert mx.abs(array).sum().item() > 0


def test_managed_memory_is_kept_on_the_host(monkeypatch):
    driver = Driver(managed=True)
    monkeypatch.setattr(host_results, "_driver", lambda: driver)
    array = mx.arange(1 << 16)
    np.testing.assert_array_equal(to_numpy(array), np.arange(1 << 16))
    address = np.array(array, copy=False).ctypes.data
    assert driver.advice == [(address, array.nbytes, 3, -1), (address, array.nbytes, 5, 0)]
    to_numpy(mx.arange(8))
    assert len(driver.advice) == 2


@pytest.mark.parametrize("driver", [Driver(managed=False), Driver(managed=True, status=1)])
def test_other_memory_is_left_alone(driver, monkeypatch):
    monkeypatch.setattr(host_results, "_driver", lambda: driver)
    assert to_numpy(mx.arange(1 << 16))[-1] == (1 << 16) - 1
    assert not driver.advice
