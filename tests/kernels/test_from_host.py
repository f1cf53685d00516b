"""NumPy arrays sent through page-locked memory, with the kernel under the emulation."""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from pmetal_distill import host_inputs
from pmetal_distill.host_inputs import to_device
from pmetal_distill.kernels import engaged
from tests.kernels.test_to_host import page_locked


@pytest.fixture
def memory(monkeypatch):
    with page_locked(monkeypatch, host_inputs) as memory:
        yield memory


def _numbers(dtype: Any, *shape: int) -> npt.NDArray[Any]:
    return np.random.default_rng(sum(shape)).integers(0, 200, shape).astype(dtype)


@pytest.mark.parametrize("dtype", host_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (300, 5), (256,)], ids=str)
def test_every_type_and_shape_arrives(memory, dtype, shape):
    numbers = _numbers(dtype, *shape)
    found = to_device(numbers)
    assert (found.shape, found.dtype) == (shape, host_inputs.DTYPES[dtype])
    np.testing.assert_array_equal(np.array(found), numbers)
    assert engaged()["from_host"] == 1


def test_what_is_not_contiguous_arrives_and_may_change_afterwards(memory):
    numbers = _numbers(np.int32, 40, 30)
    part = numbers[::2, 3:9]
    found, wanted = to_device(part), part.copy()
    numbers[:] = -1
    np.testing.assert_array_equal(np.array(found), wanted)


@pytest.mark.parametrize("sizes", [(1000, 300, 5), (512, 512, 512), (900, 1900, 100, 2000), (2048,)], ids=str)
def test_the_ring_is_not_written_before_it_is_read(memory, monkeypatch, sizes):
    monkeypatch.setattr(host_inputs, "RING_WORDS", 2048)
    host_inputs._ring.cache_clear()
    rng = np.random.default_rng(0)
    sent = [rng.integers(0, 99, rng.choice(sizes)).astype(np.int32) for _ in range(60)]
    found = [to_device(numbers) for numbers in sent]
    for numbers, array in zip(sent, found, strict=True):
        np.testing.assert_array_equal(np.array(array), numbers)
    assert len(memory.driver.given) == 1


def test_what_is_larger_than_a_part_goes_in_parts(memory, monkeypatch):
    monkeypatch.setattr(host_inputs, "MOST_WORDS", 512)
    numbers = _numbers(np.int16, 700, 3)
    np.testing.assert_array_equal(np.array(to_device(numbers)), numbers)
    assert engaged()["from_host"] == 3


def test_without_memory_other_types_and_no_numbers_mlx_makes_the_array(memory):
    assert to_device(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert to_device(np.arange(5)).dtype == mx.int64
    assert to_device([[1, 2]]).dtype == to_device(mx.array([[1, 2]])).dtype == mx.int32
    memory.driver.pieces = 0
    np.testing.assert_array_equal(np.array(to_device(np.arange(5, dtype=np.int32))), np.arange(5))
    assert "from_host" not in engaged()
