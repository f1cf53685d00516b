"""What compiles the kernels for CUDA: one build of each, kept on disk, damaged files built again."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pmetal_distill.kernels import cuda, sources
from tests.kernels import nvrtc

TEMPLATE = [("T", mx.bfloat16), ("V", 1025), ("K", 16), ("W", 8), ("U", 2), ("HINT", 0), ("TG", 512)]
TEMPLATE += [("GRAIN", 1), ("BITS", 1056)]


class Counting(cuda.Compiler):
    """Compiles nothing, and counts."""

    units: list[str] = []  # noqa: RUF012 - one list for the test

    def compile(self, unit: str) -> bytes:
        self.units.append(unit)
        return b"code of " + unit[-40:].encode()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counting:
    Counting.units.clear()
    monkeypatch.setattr(cuda, "kernel_folder", lambda: tmp_path)
    return Counting(None, tmp_path, "sm_90", "nvrtc 13.0")


def _kernel(compiler: cuda.Compiler) -> cuda.CudaKernel:
    names = ["z", "ids", "labels", "par"], ["stats", "head", "label"]
    text = sources.text("tail_sums.metal")
    return cuda.CudaKernel(compiler, "pmetal_tail_sums", *names, text, sources.header("prelude_cuda.h"))


def _unit(kernel: cuda.CudaKernel) -> str:
    inputs = [mx.bfloat16, mx.int32, mx.int32, mx.float32]
    return cuda.translation_unit(kernel, inputs, [mx.float32] * 3, TEMPLATE)


def test_a_kernel_is_built_once_for_all_processes(compiler: Counting, tmp_path: Path) -> None:
    first = cuda.machine_code(compiler, "a", "text one")
    assert cuda.machine_code(compiler, "a", "text one") == first
    assert compiler.units == ["text one"]
    cuda.machine_code(Counting(None, tmp_path, "sm_80", "nvrtc 13.0"), "a", "text one")
    cuda.machine_code(Counting(None, tmp_path, "sm_90", "nvrtc 13.1"), "a", "text one")
    assert len(compiler.units) == 3
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:10], lambda b: b"", lambda b: b[:40] + b"?" + b[41:]]
)
def test_a_damaged_file_is_built_again(compiler: Counting, tmp_path: Path, damage: Any) -> None:
    code = cuda.machine_code(compiler, "a", "text " * 20)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cuda.machine_code(compiler, "a", "text " * 20) == code
    assert len(compiler.units) == 2
    assert cuda.machine_code(compiler, "a", "text " * 20) == code
    assert len(compiler.units) == 2


def test_a_folder_that_is_gone_costs_only_time(
    compiler: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "kernel_folder", lambda: tmp_path / "gone")
    assert cuda.machine_code(compiler, "a", "text") == cuda.machine_code(compiler, "a", "text")
    monkeypatch.setattr(cuda, "kernel_folder", lambda: None)
    assert cuda.machine_code(compiler, "a", "text")


def test_a_call_builds_once_for_each_form(compiler: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", lambda **given: calls.append(given) or [])
    kernel = _kernel(compiler)

    def call(v: int, dtype: mx.Dtype) -> None:
        inputs = [mx.zeros((8, v), dtype), *(mx.zeros((8,), mx.int32),) * 2, mx.zeros((8,))]
        template = [("T", dtype), ("V", v), *TEMPLATE[2:]]
        shapes: Any = {"output_shapes": [(8, 4), (8, 16), (8,)], "output_dtypes": [mx.float32] * 3}
        kernel(inputs=inputs, template=template, grid=(512, 1, 1), threadgroup=(512, 1, 1), **shapes)

    for v, dtype in ((1025, mx.bfloat16), (1025, mx.bfloat16), (1025, mx.float32), (7, mx.float32)):
        call(v, dtype)
    assert len(calls) == 4
    assert len(compiler.units) == 3
    assert calls[0]["compiled_source"] == calls[1]["compiled_source"]
    assert calls[0]["name"] in compiler.units[0]
    assert calls[0]["ensure_row_contiguous"]


@pytest.mark.skipif(nvrtc.toolkit() is None, reason="needs the wheels of the extra kernel-checks")
def test_nvrtc_compiles_what_is_written_here(tmp_path: Path) -> None:
    import ctypes

    found = nvrtc.toolkit()
    assert found is not None
    compiler = cuda.Compiler(ctypes.CDLL(str(found[0])), found[1], "sm_90", "any")
    code = compiler.compile(_unit(_kernel(compiler)))
    assert code.startswith(b"\x7fELF")
    assert b"pmetal_tail_sums" in code
    with pytest.raises(RuntimeError, match="sm_90"):
        compiler.compile("not a kernel")
