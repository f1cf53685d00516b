"""Compiles the CUDA kernels that MLX would generate, without a GPU, with NVRTC out of NVIDIA's wheels."""

import ctypes
import re
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import mlx.core as mx

CUDA_TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}


# Names of the namespace that MLX puts a kernel into. Ours must differ: one found there hides the global one.
TAKEN = """
namespace mlx::core::cu {
using Shape = int; using Strides = int;
template <typename T, int N> struct AlignedVector { T val[N]; };
template <int N, typename T> __device__ bool is_aligned(T*);
template <int N, typename T> __device__ int load_vector(const T*, unsigned);
template <int N, typename T> __device__ int unsafe_load_vector(const T*, unsigned);
template <int N, typename T> __device__ void store_vector(T*, unsigned, int);
template <int N, typename T> __device__ void unsafe_store_vector(T*, unsigned, int);
template <typename T, typename = void> struct Limits {};
template <typename I> __device__ I elem_to_loc(I);
}
"""


def toolkit() -> tuple[Path, Path] | None:
    """NVRTC's library and the folder of CUDA's headers, out of NVIDIA's wheels; None without them."""
    spec = util.find_spec("nvidia")
    for root in map(Path, (spec.submodule_search_locations or []) if spec else []):
        libraries = sorted(root.glob("**/libnvrtc.so*"))
        headers = sorted(root.glob("**/cuda_bf16.h"))
        if libraries and headers:
            return libraries[0], headers[0].parent
    return None


def generated(
    name: str,
    inputs: Sequence[tuple[str, mx.Dtype]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    source: str,
    header: str,
    template: Sequence[tuple[str, Any]],
) -> str:
    """The translation unit around a body, as MLX's CUDA back end writes it."""
    parameters = [f"const {CUDA_TYPES[d]}* {n}" for n, d in inputs] + [
        f"{CUDA_TYPES[d]}* {n}" for n, d in outputs
    ]
    constants = []
    for key, value in template:
        if isinstance(value, mx.Dtype):
            constants.append(f"  using {key} = {CUDA_TYPES[value]};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            constants.append(f"  constexpr {kind} {key} = {str(value).lower()};")
    return "\n".join(
        (
            "typedef int int32_t; typedef unsigned int uint32_t; typedef unsigned long size_t;",
            TAKEN,
            header,
            "namespace mlx::core::cu {",
            f'extern "C" __global__ void {name}({", ".join(parameters)}) {{',
            *constants,
            source,
            "}\n}",
        )
    )


class CompileError(AssertionError):
    """NVRTC refused the text."""


def compile_cuda(code: str, architecture: str) -> tuple[bytes, str]:
    """The cubin and the compiler's log (registers, shared memory, spills).

    Raises:
        CompileError: with the log.
    """
    found = toolkit()
    assert found is not None
    library = ctypes.CDLL(str(found[0]))
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None)
    options = [
        f"--gpu-architecture={architecture}",
        f"--include-path={found[1]}",
        "--ptxas-options=-v",
        "-std=c++17",
    ]
    raw = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    status = library.nvrtcCompileProgram(program, len(options), raw)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    text = log.value.decode()
    if status:
        raise CompileError(f"{architecture}\n{text[:4000]}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, text


def registers(log: str) -> int:
    """Registers a thread, from the compiler's log."""
    match = re.search(r"Used (\d+) registers", log)
    return int(match.group(1)) if match else 0


def spilled_bytes(log: str) -> int:
    """Bytes of registers spilled to memory."""
    return sum(int(b) for b in re.findall(r"(\d+) bytes spill", log))
