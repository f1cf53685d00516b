"""Callables shaped like `mx.fast.metal_kernel` that compile a body with the host's C++ compiler and run it.

A build takes about a second and is kept by content in a temporary folder. Whole-number template arguments
that the bodies use as plain numbers (sizes) are passed at run time, so one build serves every size.
"""

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
RUN_TIME = ("V", "K", "D", "TG", "BITS", "CAP", "SAMPLE", "FLOOR_BIT", "KEY_BIT", "ONE", "GRAIN")
C_TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-fno-math-errno", "-ffp-contract=off")
GUARD = 1 << 20  # a multiple of every page size; wide enough for any wrong index of a row
PAGE = mmap.PAGESIZE
PATTERN = 0xA5


class EmulationError(AssertionError):
    """The body raced, diverged at a barrier or left its arrays; or the compiler refused it."""


def compiler() -> str | None:
    """The C++ compiler to use, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the emulation runs: order 0 ascending, 1 descending, n >= 2 random with seed n; where arrays lie.

    Attributes:
        order: of simdgroups and lanes between barriers.
        shift: elements between an aligned address and the start of each array; None puts the end of each
            array right before the guard page, at whatever alignment that gives.
    """

    order: int = 0
    shift: int | None = 0


class GuardedArray:
    """Memory between two inaccessible pages; bytes around the array hold a pattern that `check` looks for."""

    def __init__(self, nbytes: int, itemsize: int, shift: int | None) -> None:
        body = -(-(nbytes + (shift or 0) * itemsize + 64) // PAGE) * PAGE
        self.map = mmap.mmap(-1, body + 2 * GUARD)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        for start in (base, base + GUARD + body):
            if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(GUARD), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.view = np.frombuffer(self.map, np.uint8, count=body, offset=GUARD)
        self.view[:] = PATTERN
        end = body - nbytes
        self.start = end if shift is None else (end - shift * itemsize) // 64 * 64 + shift * itemsize
        if shift is not None and self.start > end:
            self.start -= 64
        self.nbytes = nbytes
        self.address = base + GUARD + self.start

    @property
    def data(self) -> Any:
        """The array's own bytes."""
        return self.view[self.start : self.start + self.nbytes]

    def check(self) -> bool:
        """Whether the bytes around the array are untouched."""
        around = (self.view[: self.start], self.view[self.start + self.nbytes :])
        return all(bool((part == PATTERN).all()) for part in around)


def to_numpy(array: mx.array) -> Any:
    """NumPy copy; bfloat16 as its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _to_mlx(data: Any, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    carrier = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16, mx.int32: np.int32}
    carrier[mx.uint32] = np.uint32
    array = mx.array(data.view(carrier[dtype]).reshape(shape).copy())
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def _source(
    body: str, header: str, arguments: Sequence[tuple[str, str]], template: Sequence[tuple[str, Any]]
) -> str:
    lines = []
    for name, value in template:
        if isinstance(value, mx.Dtype):
            lines.append(f"using {name} = {C_TYPES[value]};")
        elif name in RUN_TIME:
            lines.append(f"const int {name} = numbers[{RUN_TIME.index(name)}];")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr {kind} {name} = {str(value).lower()};")
    for index, (kind, name) in enumerate(arguments):
        lines.append(f"{kind} {name} = static_cast<{kind}>(pointers[{index}]);")
    return "\n".join(
        (
            '#include "prelude_host.h"',
            header,
            "static void** pointers; static const int* numbers;",
            "static void body() {",
            *lines,
            body,
            "}",
            'extern "C" const char* run(void** p, const int* n, uint grid, uint threads, int order) {',
            "pointers = p; numbers = n;",
            "return emulator::launch(body, grid, threads, order); }",
        )
    )


def _library(name: str, code: str) -> ctypes.CDLL:
    parts = [
        code,
        *FLAGS,
        *((HERE / f).read_text() for f in ("prelude_host.h", "emulator.hpp", "switch.hpp")),
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"pmetal-host-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{name}-{digest}.so"
    if not library.exists():
        source = folder / f"{name}-{digest}-{os.getpid()}.cpp"
        source.write_text(code)
        made = source.with_suffix(".so")
        command = [str(compiler()), *FLAGS, f"-I{HERE}", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EmulationError(f"{name}: the host's compiler refused the body\n{done.stderr[:4000]}")
        made.replace(library)
        source.unlink()
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    return loaded


def host_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    schedule: Callable[[], Schedule] = Schedule,
) -> Callable[..., list[mx.array]]:
    """A kernel with the signature of `mx.fast.metal_kernel`'s result that runs under the emulation.

    Raises:
        EmulationError: on calling it, where the body races, diverges at a barrier or leaves its arrays.
    """

    def call(
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        plan = schedule()
        arrays = [to_numpy(a) for a in inputs]
        sizes = [(a.nbytes, a.itemsize) for a in arrays]
        sizes += [
            (int(np.prod(s)) * d.size, d.size) for s, d in zip(output_shapes, output_dtypes, strict=True)
        ]
        memory = [GuardedArray(nbytes, itemsize, plan.shift) for nbytes, itemsize in sizes]
        for array, place in zip(arrays, memory, strict=False):
            place.data[:] = np.frombuffer(array.tobytes(), np.uint8)
        for place in memory[len(arrays) :]:
            place.data[:] = 0xFF
        kinds = [(f"const {C_TYPES[a.dtype]}*", n) for a, n in zip(inputs, input_names, strict=True)]
        kinds += [(f"{C_TYPES[d]}*", n) for d, n in zip(output_dtypes, output_names, strict=True)]
        library = _library(name, _source(source, header, kinds, template))
        given = dict(template)
        numbers = (ctypes.c_int * len(RUN_TIME))(*(int(given.get(n, 0)) for n in RUN_TIME))
        pointers = (ctypes.c_void_p * len(memory))(*(m.address for m in memory))
        error = library.run(pointers, numbers, grid[0], threadgroup[0], plan.order)
        if error:
            raise EmulationError(f"{name}, {plan}: {error.decode()}")
        if not all(place.check() for place in memory):
            raise EmulationError(f"{name}, {plan}: wrote outside an array")
        outputs = memory[len(arrays) :]
        return [
            _to_mlx(place.data, shape, dtype)
            for place, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
        ]

    return call


def without_barrier(source: str, index: int) -> str:
    """The body without its barrier number `index`."""
    places = list(re.finditer(r"threadgroup_barrier\([^)]*\);", source))
    place = places[index]
    return source[: place.start()] + ";" + source[place.end() :]


def count_barriers(source: str) -> int:
    """Barriers in a body."""
    return len(re.findall(r"threadgroup_barrier\([^)]*\);", source))
