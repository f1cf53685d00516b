"""Gives MLX's CPU build a fast BLAS. Costs one dlopen, on Linux without an NVIDIA driver only.

The Linux CPU wheel of MLX links a reference BLAS (about 6 GFLOP/s on two cores). Loading OpenBLAS into the
process with global symbol visibility before `mlx.core` is imported lets the dynamic linker bind MLX's calls
to it instead: about 60 times faster in float32. On macOS (Accelerate) and CUDA nothing of the kind is needed.
"""

import ctypes
import sys
from pathlib import Path

_LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")
HINT = (
    "no OpenBLAS found: float32 matrix products run about 60 times slower "
    "(Debian: apt install libopenblas0-pthread)"
)


def needs_preload() -> bool:
    """Whether this process will compute on MLX's Linux CPU build."""
    return sys.platform == "linux" and not Path("/proc/driver/nvidia/version").exists()


def preload() -> str | None:
    """Loads OpenBLAS with global visibility.

    Returns:
        the library's name, or None where it is not needed or not installed.
    """
    if not needs_preload():
        return None
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None
