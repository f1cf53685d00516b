"""Which back end runs the kernels, and how one is launched.

`backend()` is decided at each call from the environment and MLX's default device, so that a test or a user
can switch without restarting. Compiled kernels are kept by MLX.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import mlx.core as mx

from pmetal_distill.device import on_cuda, on_gpu
from pmetal_distill.kernel_folder import kernel_folder
from pmetal_distill.kernels import sources
from pmetal_distill.kernels.cuda import make_kernel
from schemas.errors import UsageError

kernel_folder()  # before MLX builds its first kernel
Backend = Literal["metal", "cuda", "plain"]
Kernel = Callable[..., list[mx.array]]
Maker = Callable[..., Kernel]
Outputs = dict[str, tuple[tuple[int, ...], mx.Dtype]]
VARIABLE = "PMETAL_KERNELS"
SMALLEST_ARRAY = 8  # Metal hands smaller inputs to a kernel in another address space


@dataclass(frozen=True, slots=True)
class Platform:
    """A compiler of kernel bodies.

    Attributes:
        name: goes into the choice of launch shapes.
        make: called like `mx.fast.metal_kernel`.
        prelude: file of `src/` that makes Metal's words known; empty where `make` brings its own.
    """

    name: str
    make: Maker
    prelude: str


METAL = Platform("metal", cast(Maker, mx.fast.metal_kernel), "prelude_metal.h")
CUDA = Platform("cuda", cast(Maker, make_kernel), "prelude_cuda.h")
_given: ContextVar[Platform | None] = ContextVar("platform", default=None)
_engaged: Counter[str] = Counter()


def backend() -> Backend:
    """What runs the kernels: Metal, CUDA, or plain MLX operations.

    Raises:
        UsageError: the environment variable PMETAL_KERNELS has a value other than "auto" and "plain".
    """
    wish = os.environ.get(VARIABLE, "auto") or "auto"
    if wish not in ("auto", "plain"):
        raise UsageError(f"{VARIABLE}: must be 'auto' or 'plain', found {wish!r}; unset it for the default")
    if wish == "plain" or not on_gpu():
        return "plain"
    if mx.metal.is_available():
        return "metal"
    return "cuda" if on_cuda() else "plain"


def platform() -> Platform | None:
    """The compiler in force; None for plain operations."""
    given = _given.get()
    if given is not None:
        return given
    return {"metal": METAL, "cuda": CUDA, "plain": None}[backend()]


def platform_name() -> str:
    """Name of the compiler in force; "plain" for plain operations."""
    given = platform()
    return given.name if given else "plain"


@contextmanager
def using(given: Platform) -> Iterator[None]:
    """Runs all kernels on the given platform inside the context."""
    token = _given.set(given)
    try:
        yield
    finally:
        _given.reset(token)


def engaged() -> dict[str, int]:
    """How often each kernel was put into a graph since the start of the process (or `reset_engaged`)."""
    return dict(_engaged)


def reset_engaged() -> None:
    """Sets all counts of `engaged` to zero."""
    _engaged.clear()


@cache
def constants(*values: float) -> mx.array:
    """Numbers as float32 [n], made once: a device fetches memory that the host has written page by page."""
    return mx.array(values, mx.float32)


def large_enough(array: mx.array) -> mx.array:
    """The same elements in order, padded with zeros to at least 8 (as a vector) where there are fewer."""
    if array.size >= SMALLEST_ARRAY:
        return array
    padding = mx.zeros((SMALLEST_ARRAY - array.size,), array.dtype)
    return mx.concatenate([array.reshape(-1), padding])


@cache
def _compiled(given: Platform, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Kernel:
    return given.make(
        name=f"pmetal_{name}_{sources.digest(name, given.prelude)}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=sources.text(f"{name}.metal"),
        header=sources.header(given.prelude),
    )


def launch(
    name: str,
    inputs: dict[str, mx.array],
    outputs: Outputs,
    *,
    template: Sequence[tuple[str, Any]],
    groups: int,
    threads: int,
) -> list[mx.array]:
    """Puts one kernel into the graph.

    Args:
        name: of a body in `src/`.
        inputs: arrays by the body's names.
        outputs: shape and type by the body's names; none may be empty.
        template: types and whole numbers, compile-time constants of the body.
        groups: threadgroups.
        threads: threads of each, a multiple of 32.
    """
    given = platform()
    if given is None:
        raise RuntimeError(f"kernel {name}: launched with no back end for kernels")
    _engaged[name] += 1
    kernel = _compiled(given, name, tuple(inputs), tuple(outputs))
    return kernel(
        inputs=[large_enough(a) for a in inputs.values()],
        template=list(template),
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
