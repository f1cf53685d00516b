"""The texts that MLX generates: frames are pinned, a C++ front end checks Metal's, NVRTC compiles CUDA's."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pmetal_distill.kernels import dispatch, sources, tuning
from tests.kernels import nvrtc, recorder, scenarios

HERE = Path(__file__).parent
FIXED = {mx.float32, mx.int32, mx.uint32}  # where a kernel takes them, it takes nothing else there
GOLDEN = HERE / "golden" / "metal_frames.txt"
KERNELS = {
    "tail_sums",
    "tail_sums_grad",
    "pair_sums",
    "pair_divergence",
    "pair_grad",
    "feature_sums",
    "feature_grad",
    "capture",
    "take_off",
    "to_host",
    "from_host",
}


def _metal_maker(**arguments: Any) -> Callable[..., list[mx.array]]:
    kernel: Any = mx.fast.metal_kernel(**arguments)
    return lambda **rest: kernel(**rest, verbose=True, stream=mx.gpu)


def _generated(dtype: mx.Dtype, folder: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Metal texts by kernel name, as MLX prints them while it exports a function."""
    arrays = scenarios.arrays_for(dtype)
    platform = dispatch.Platform("metal", _metal_maker, "prelude_metal.h")
    capfd.readouterr()
    with dispatch.using(platform), tuning.using(tuning.Shape(256, 2)):
        mx.export_function(
            str(folder / "all.mlxfn"),
            lambda *values: scenarios.launch_all(dict(zip(arrays, values, strict=True))),
            *arrays.values(),
        )
    printed = capfd.readouterr().out
    found = re.findall(r"Generated source code for `(\w+)`:\n```\n(.*?)\n```", printed, re.DOTALL)
    return {f"{name} {index}": text for index, (name, text) in enumerate(found)}


def _frame(text: str) -> str:
    """What MLX wrote around header and body, without the digest of the text."""
    start = text.index("[[kernel]] void custom_kernel_")
    signature = text[text.rindex("template <", 0, start) : text.index(") {", start) + 3]
    instance = text[text.rindex("template [[host_name") :]
    return re.sub(r"_[0-9a-f]{10}_", "_DIGEST_", f"{signature}\n{instance}")


def test_frames_and_texts_are_the_expected_ones(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = _generated(mx.bfloat16, tmp_path, capfd)
    names = {re.sub(r"^pmetal_(\w+)_[0-9a-f]{10} \d+$", r"\1", name) for name in texts}
    assert names == KERNELS
    for name, text in texts.items():
        body = re.sub(r"^pmetal_(\w+)_[0-9a-f]{10} \d+$", r"\1", name)
        assert text.startswith(sources.header("prelude_metal.h"))
        assert sources.text(f"{body}.metal") in text
    frames = "\n".join(sorted({_frame(text) for text in texts.values()})) + "\n"
    assert frames == GOLDEN.read_text(), f"if MLX changed what it writes, and rightly: new frames\n{frames}"


def _front_end(text: str, folder: Path) -> str:
    """What clang says about a generated text, with address spaces that do not convert into each other."""
    for declared in ("threadgroup TYPE NAME[COUNT]", "threadgroup metal::atomic_uint NAME[COUNT]"):
        assert declared in text
        text = text.replace(declared, f"static {declared}")  # C++ knows such variables as static only
    text = re.sub(
        r"^template \[\[host_name\([^\]]*\)\]\] \[\[kernel\]\]", "template", text, flags=re.MULTILINE
    )
    path = folder / "kernel.cpp"
    path.write_text('#include "metal_shim.hpp"\n' + text)
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "clang",
        "-x",
        "c++",
        "-std=c++17",
        "-fsyntax-only",
        "-nostdinc",
    ]
    options = ["-Wall", "-Werror", "-Wno-unknown-attributes", "-Wno-unused", f"-I{HERE / 'front'}"]
    done = subprocess.run([*command, *options, str(path)], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="the wheel ziglang is not installed")
def test_a_front_end_with_address_spaces_accepts_every_metal_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = _generated(mx.bfloat16, tmp_path, capfd)
    for name, text in texts.items():
        assert _front_end(text, tmp_path) == "", name
    text = next(iter(texts.values()))
    wrong = text.replace("const DEVICE T* in", "const THREAD T* in")
    assert wrong != text
    assert "cannot initialize" in _front_end(wrong, tmp_path)


def test_metal_texts_avoid_what_metal_lacks() -> None:
    for name in [*(f"{k}.metal" for k in KERNELS), "common.h", "prelude_metal.h"]:
        code = re.sub(r"//.*", "", sources.text(name))
        for word in ("double", "auto&&", "[=]", "[&]", "new ", "std::", "goto", "try", "throw", "virtual"):
            assert word not in code, f"{name} has '{word}'"
        assert not re.search(r"\bfor\b[^{;]*:[^:]", code), f"{name} has a range loop"


def _cuda_launches(dtype: mx.Dtype, shape: tuning.Shape) -> list[recorder.Launch]:
    platform, launches = recorder.recording("prelude_cuda.h")
    with dispatch.using(platform), tuning.using(shape):
        scenarios.launch_all(scenarios.arrays_for(dtype, vocab=151936, k=64))
    return launches


@pytest.mark.skipif(
    nvrtc.toolkit() is None, reason="the wheels nvidia-cuda-nvrtc and -runtime are not installed"
)
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("sm_90", mx.bfloat16), ("sm_90", mx.float32), ("sm_80", mx.float16)],
    ids=str,
)
def test_nvrtc_compiles_every_cuda_text(architecture: str, dtype: mx.Dtype) -> None:
    launches = _cuda_launches(dtype, tuning.Shape(512, 1, 1))
    assert {re.sub(r"^pmetal_(\w+)_\w{10}$", r"\1", launch.name) for launch in launches} == KERNELS
    for launch in launches:
        frame = (launch.name, launch.inputs, launch.outputs, launch.source, launch.header, launch.template)
        cubin, log = nvrtc.compile_cuda(nvrtc.generated(*frame), architecture)
        assert len(cubin) > 1000
        assert nvrtc.spilled_bytes(log) == 0, launch.name
        assert nvrtc.registers(log) * launch.threads <= 65536, launch.name


@pytest.mark.skipif(
    nvrtc.toolkit() is None, reason="the wheels nvidia-cuda-nvrtc and -runtime are not installed"
)
def test_nvrtc_refuses_a_wrong_text() -> None:
    launch = _cuda_launches(mx.float32, tuning.Shape(512, 1))[0]
    source = launch.source.replace("lead_in<W>(in, V)", "lead_in<W>(V, in)")
    assert source != launch.source
    frame = (launch.name, launch.inputs, launch.outputs, source, launch.header, launch.template)
    with pytest.raises(nvrtc.CompileError):
        nvrtc.compile_cuda(nvrtc.generated(*frame), "sm_90")


def test_names_change_with_the_text_and_types_are_template_arguments() -> None:
    names = {
        sources.digest(name, prelude) for name in KERNELS for prelude in ("prelude_cuda.h", "prelude_metal.h")
    }
    assert len(names) == 2 * len(KERNELS)
    launches = _cuda_launches(mx.float32, tuning.Shape(512, 1))
    for launch in launches:
        given = [d for _, d in (*launch.inputs, *launch.outputs)]
        named = [v for _, v in launch.template if isinstance(v, mx.Dtype)]
        assert {d for d in given if d not in FIXED} <= set(named), launch.name
