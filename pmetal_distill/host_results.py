"""Results of a device as NumPy arrays, without slowing the device down. Costs one copy.

On CUDA, MLX moves an array that NumPy asks for into managed memory and uses that memory again for later
arrays. Its pages then lie on the host, and the kernel that writes the next array faults them back one by one:
stage one on an H100 lost 5 % to this. Told to keep such memory on the host and mapped on the device, the
driver lets the kernel write over the bus instead. Nothing of this concerns Metal, whose memory is shared.
"""

import ctypes
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# Of cuda.h.
_IS_MANAGED = 8
_PREFERRED_LOCATION, _ACCESSED_BY = 3, 5
_HOST, _DEVICE = -1, 0
_LEAST_BYTES = 1 << 16


def to_numpy(array: mx.array) -> npt.NDArray[Any]:
    """A copy of a computed array; waits for it. bfloat16, which NumPy lacks, comes as float32."""
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    if array.nbytes < _LEAST_BYTES or (driver := _driver()) is None:
        return np.array(array)
    view = np.array(array, copy=False)
    _stay_on_host(driver, view.ctypes.data, view.nbytes)
    return view.copy()


@cache
def _driver() -> ctypes.CDLL | None:
    """The CUDA driver's library where MLX computes on CUDA."""
    if mx.default_device().type != mx.DeviceType.gpu or not mx.cuda.is_available():
        return None
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _stay_on_host(driver: ctypes.CDLL, address: int, size: int) -> None:
    """Advice to the driver, for managed memory only. It changes no result, so a refusal is no error."""
    pointer, managed = ctypes.c_uint64(address), ctypes.c_uint32(0)
    asked = driver.cuPointerGetAttribute(ctypes.byref(managed), ctypes.c_int(_IS_MANAGED), pointer)
    if asked == 0 and managed.value:
        for advice, place in ((_PREFERRED_LOCATION, _HOST), (_ACCESSED_BY, _DEVICE)):
            driver.cuMemAdvise(pointer, ctypes.c_size_t(size), ctypes.c_int(advice), ctypes.c_int(place))
