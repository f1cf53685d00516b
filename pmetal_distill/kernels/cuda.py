"""Compiles the kernels for CUDA and keeps what it compiled: a process builds only what none has built before.

MLX compiles each custom kernel again in every process, one to two seconds each, most of it for headers that
ours do not need. Here NVRTC (which MLX has loaded already) gets the kernel alone, and its machine code is
put into `kernel_folder`, named by a hash of all that decides it: text, types, constants, architecture,
compiler. A file begins with the SHA-256 of the rest; a damaged one is built again. Without NVRTC or CUDA's
headers MLX compiles.
"""

import contextlib
import ctypes
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

import mlx.core as mx

from pmetal_distill.kernel_folder import architecture, kernel_folder, write_whole

Template = Sequence[tuple[str, Any]]
TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int",
    mx.uint32: "unsigned int",
}
_HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class Compiler:
    """NVRTC for the GPU of this process.

    Attributes:
        library: NVRTC.
        headers: folder of cuda_fp16.h and its like.
        architecture: "sm_90".
        version: of NVRTC.
    """

    library: Any
    headers: Path
    architecture: str
    version: str

    def compile(self, unit: str) -> bytes:
        """The machine code of a translation unit.

        Raises:
            RuntimeError: NVRTC refuses it; with its log.
        """
        program = ctypes.c_void_p()
        self._check(
            self.library.nvrtcCreateProgram(ctypes.byref(program), unit.encode(), b"pmetal.cu", 0, None, None)
        )
        options = [f"--gpu-architecture={self.architecture}", f"--include-path={self.headers}"]
        raw = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            if self.library.nvrtcCompileProgram(program, len(options), raw):
                log = self._read(program, "ProgramLog").decode(errors="replace")
                raise RuntimeError(f"NVRTC cannot compile a kernel for {self.architecture}:\n{log[:4000]}")
            return self._read(program, "CUBIN")
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, text))
        return text.raw

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC: a call failed with status {status}")


@dataclass(frozen=True, slots=True, eq=False)
class CudaKernel:
    """One body; called like what `mx.fast.cuda_kernel` returns."""

    compiler: Compiler
    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str
    _built: dict[Any, bytes] = field(default_factory=dict)

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Template,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        types = [array.dtype for array in inputs], list(output_dtypes)
        form = (tuple(map(str, types[0])), tuple(map(str, types[1])), tuple(map(str, template)))
        if form not in self._built:
            unit = translation_unit(self, types[0], types[1], template)
            self._built[form] = machine_code(self.compiler, self.name, unit)
        found: list[mx.array] = mx.fast.precompiled_cuda_kernel(
            name=self.name,
            compiled_source=self._built[form],
            inputs=list(inputs),
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            scalars=[],
            grid=grid,
            threadgroup=threadgroup,
            ensure_row_contiguous=True,
        )
        return found


def make_kernel(
    *, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str
) -> Any:
    """A kernel of this text: built here where that can be done, else by MLX."""
    if (found := compiler()) is None:
        return mx.fast.cuda_kernel(
            name=name, input_names=input_names, output_names=output_names, source=source, header=header
        )
    return CudaKernel(found, name, input_names, output_names, source, header)


def translation_unit(
    kernel: CudaKernel, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype], template: Template
) -> str:
    """The whole text: the header, and the body as a function of pointers, with constants in front of it."""
    parameters = [f"const {TYPES[d]}* {n}" for n, d in zip(kernel.input_names, inputs, strict=True)]
    parameters += [f"{TYPES[d]}* {n}" for n, d in zip(kernel.output_names, outputs, strict=True)]
    constants = [_constant(key, value) for key, value in template]
    head = f'extern "C" __global__ void {kernel.name}({", ".join(parameters)}) {{'
    return "\n".join((kernel.header, head, *constants, kernel.source, "}"))


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"    using {name} = {TYPES[value]};"
    return f"    constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {str(value).lower()};"


def machine_code(compiler: Compiler, name: str, unit: str) -> bytes:
    """Of a translation unit: from the folder of kernels, or compiled and put there."""
    decides = "\n".join((compiler.version, compiler.architecture, unit))
    digest = hashlib.sha256(decides.encode()).hexdigest()[:24]
    folder = kernel_folder()
    path = None if folder is None else folder / f"{name}-{compiler.architecture}-{digest}.cubin"
    if path is not None and (kept := _read_kept(path)) is not None:
        return kept
    code = compiler.compile(unit)
    if path is not None:
        with contextlib.suppress(OSError):  # a full or read-only disk costs the next process a second
            write_whole(path, hashlib.sha256(code).digest() + code)
    return code


def _read_kept(path: Path) -> bytes | None:
    """The code in a file, if it is what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    kept, code = data[:_HASH_BYTES], data[_HASH_BYTES:]
    return code if code and hashlib.sha256(code).digest() == kept else None


@cache
def compiler() -> Compiler | None:
    """NVRTC, CUDA's headers and the GPU's architecture; None where one of them is not found."""
    library, headers, gpu = _library(), _headers(), architecture()
    if library is None or headers is None or gpu is None:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
        return None
    return Compiler(library, headers, gpu, f"nvrtc {major.value}.{minor.value}")


def _library() -> Any:
    """The NVRTC that MLX has loaded, else one by its usual name."""
    names = ["libnvrtc.so.13", "libnvrtc.so.12"]
    with contextlib.suppress(OSError):
        found = re.search(r"\S*/libnvrtc\.so\S*", Path("/proc/self/maps").read_text())
        names = [found.group(), *names] if found else names
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _headers() -> Path | None:
    """Where cuda_fp16.h lies: beside MLX, in NVIDIA's wheels, or in a toolkit of the system."""
    roots = [Path(place) for place in _places("nvidia")]
    roots += [Path(place).parent / "nvidia" for place in _places("mlx")]
    folders = [root / name / "include" for root in roots for name in ("cu13", "cu12", "cuda_runtime")]
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders += [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_fp16.h").is_file()), None)


def _places(package: str) -> list[str]:
    """The folders of an installed package."""
    spec = util.find_spec(package)
    return [] if spec is None else list(spec.submodule_search_locations or [])
