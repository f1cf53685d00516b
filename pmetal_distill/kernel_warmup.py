"""Builds MLX's own CUDA kernels that every run needs, side by side in processes of their own, ahead of use.

MLX builds a kernel where it is first used, one after the other under a lock, four to five seconds each (a
lookup in an embedding, the sum of its gradients, a gated activation). Each recipe here makes MLX use one of
them on a few numbers, in a process that ends then; what it built lies in `kernel_folder` for all later
processes. A file there says that a recipe is done, so from the second command on nothing is started. Costs
one core for seconds, and some 300 MB of the GPU, for each recipe while it runs.

    python -m pmetal_distill.kernel_warmup take bfloat16        what such a process does
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pmetal_distill.kernel_folder import kernel_folder

WAIT_SECONDS = 30.0
MOST_PROCESSES = 12
INSIDE = "PMETAL_WARMING"  # set in the processes started here, which start none themselves
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_started: dict[str, "subprocess.Popen[bytes]"] = {}


def begin(dtypes: Sequence[str]) -> None:
    """Starts what has not been built for these types; returns at once. Does nothing without a CUDA GPU."""
    folder = kernel_folder()
    # Of the processes of a launch one is enough.
    first = all(os.environ.get(name, "0") == "0" for name in RANKS)
    if folder is None or INSIDE in os.environ or not first:
        return
    wanted = [(name, dtype) for dtype in dtypes for name in RECIPES]
    wanted = [(n, d) for n, d in wanted if f"{n}-{d}" not in _started and not _mark(folder, n, d).exists()]
    room = min(MOST_PROCESSES, (os.cpu_count() or 1) - 1) - len(_started)
    for name, dtype in wanted[: max(0, room)]:
        with contextlib.suppress(OSError):  # no process to be had: MLX builds the kernel when it needs it
            _started[f"{name}-{dtype}"] = subprocess.Popen(
                [sys.executable, "-m", "pmetal_distill.kernel_warmup", name, dtype],
                env={**os.environ, INSIDE: "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


def wait() -> None:
    """Until all that `begin` started has ended, for at most half a minute: the kernels are needed now."""
    end = time.monotonic() + WAIT_SECONDS
    for process in _started.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    _started.clear()


def run(name: str, dtype: str) -> None:
    """Uses one kind of kernel, and marks it as built."""
    import mlx.core as mx

    mx.eval(RECIPES[name](getattr(mx, dtype)))
    if (folder := kernel_folder()) is not None:
        _mark(folder, name, dtype).touch()


def _mark(folder: Path, name: str, dtype: str) -> Path:
    return folder / f"built-{name}-{dtype}"


def _take(dtype: Any) -> Any:
    import mlx.core as mx

    return mx.zeros((8, 64), dtype)[mx.array([[1, 2]], mx.int32)]


def _sum_of_lookups(dtype: Any) -> Any:
    import mlx.core as mx

    ids = mx.array([[1, 2]], mx.int32)
    return mx.grad(lambda table: table[ids].astype(mx.float32).sum())(mx.zeros((8, 64), dtype))


def _take_along(dtype: Any) -> Any:
    import mlx.core as mx

    return mx.take_along_axis(mx.zeros((8, 64), dtype), mx.zeros((8, 2), mx.int32), axis=-1)


def _put_along(dtype: Any) -> Any:
    import mlx.core as mx

    ids, ones = mx.zeros((8, 1), mx.int32), mx.ones((8, 1), dtype)
    return mx.put_along_axis(mx.zeros((8, 64), dtype), ids, ones, axis=-1)


def _gated(dtype: Any) -> Any:
    import mlx.core as mx
    from mlx_lm.models.activations import swiglu

    return swiglu(mx.zeros((1, 8, 64), dtype), mx.zeros((1, 8, 64), dtype))


RECIPES: dict[str, Callable[[Any], Any]] = {
    "take": _take,
    "swiglu": _gated,
    "sum-of-lookups": _sum_of_lookups,
    "take-along": _take_along,
    "put-along": _put_along,
}


if __name__ == "__main__":
    run(*sys.argv[1:3])
