"""The kernel that writes to memory of the host, under the emulation, and the copies made with it."""

import ctypes
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill import host_results
from pmetal_distill.host_results import HostCopy, to_numpy
from pmetal_distill.kernels import dispatch, engaged
from pmetal_distill.kernels.to_host import address_of, to_host
from pmetal_distill.pinned import BLOCK, PinnedMemory
from tests.kernels.host.builder import host_kernel

HOST = dispatch.Platform("cuda", host_kernel, "")


class Driver:
    """Gives memory as libcuda does, until it has none."""

    def __init__(self, pieces: int = 99) -> None:
        self.pieces: int = pieces
        self.given: list[ctypes.Array[ctypes.c_char]] = []

    def cuMemHostAlloc(self, out, size, flags):
        assert flags.value == 3
        if len(self.given) == self.pieces:
            return 2
        self.given.append(ctypes.create_string_buffer(size.value))
        ctypes.cast(out, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.addressof(self.given[-1])
        return 0


@contextmanager
def page_locked(monkeypatch, module):
    """Lets `module` find such memory, and kernels run under the emulation."""
    memory = PinnedMemory(Driver(), mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))
    monkeypatch.setattr(module, "pinned_memory", lambda: memory)
    monkeypatch.setattr(module, "backend", lambda: "cuda")
    with dispatch.using(HOST):
        yield memory


@pytest.fixture
def memory(monkeypatch):
    with page_locked(monkeypatch, host_results) as memory:
        yield memory


@pytest.mark.parametrize("count", [1, 8, 255, 256, 257, 5000])
def test_all_words_arrive_and_no_others_change(count):
    place = np.full(6000, 7, np.uint32)
    words = np.random.default_rng(count).integers(0, 1 << 32, count, dtype=np.uint32)
    with dispatch.using(HOST):
        done = to_host(mx.array(words), address_of(place.ctypes.data + 4 * 10))
    assert done[0].item() == 1
    np.testing.assert_array_equal(place[10 : 10 + count], words)
    assert set(np.delete(place, slice(10, 10 + count))) == {7}


@pytest.mark.parametrize("dtype", [mx.float32, mx.int32, mx.uint32])
def test_copies_are_equal_independent_and_share_their_memory_in_turns(memory, dtype):
    arrays = [(mx.arange(600) + i).astype(dtype).reshape(20, 30)[::2] for i in range(3)]
    first, second = HostCopy(arrays[0]), HostCopy(arrays[1])
    first.wait()
    second.wait()
    found = [first.take(), second.take(), HostCopy(arrays[2]).take()]
    for array, numbers in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(numbers, np.array(array))
        assert numbers.dtype == np.array(array).dtype
    assert len(memory.driver.given) == 2
    assert engaged()["to_host"] == 3


def test_memory_comes_in_few_sizes(memory):
    small, large = memory.take(5), memory.take(BLOCK + 1)
    assert (small.words.nbytes, large.words.nbytes) == (BLOCK, 2 * BLOCK)
    memory.give_back(small)
    assert memory.take(BLOCK) is small
    assert memory.take(BLOCK) is not small


def test_where_the_driver_has_no_memory_mlx_copies(memory):
    memory.driver.pieces = 0
    np.testing.assert_array_equal(HostCopy(mx.arange(50)).take(), np.arange(50))
    assert "to_host" not in engaged()


def test_plain_operations_use_no_kernel(memory, monkeypatch):
    monkeypatch.setattr(host_results, "backend", lambda: "plain")
    np.testing.assert_array_equal(to_numpy(mx.arange(50)), np.arange(50))
    assert not memory.driver.given
