"""The folder of compiled CUDA kernels: what is kept, what is removed; nothing there stops a process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pmetal_distill import kernel_folder as folders
from pmetal_distill import kernel_warmup
from pmetal_distill.kernel_folder import index_kernels, kernel_folder, remove_damaged


def _elf(sections: int = 3) -> bytes:
    """A file that says where its table of sections ends: an ELF64 header, and that many bytes."""
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    header[40:48] = (64).to_bytes(8, "little")
    header[58:60], header[60:62] = (64).to_bytes(2, "little"), sections.to_bytes(2, "little")
    return bytes(header) + bytes(range(64)) * sections


def _put(folder: Path, name: str, code: bytes | None = None) -> Path:
    path = folder / f"{name}.ptx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_elf() if code is None else code)
    path.with_suffix(".txt").write_text("mlx::core::cu::f\t_Z1f\n")
    path.with_suffix(".cu").write_text("source")
    return path


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with an NVIDIA GPU, whose caches lie in `tmp_path`."""
    monkeypatch.delenv(folders.VARIABLE, raising=False)
    monkeypatch.setenv("PMETAL_HOME", str(tmp_path))
    monkeypatch.setattr(folders, "architecture", lambda: "sm_90")
    monkeypatch.setattr(folders.atexit, "register", lambda *_: None)
    kernel_folder.cache_clear()
    yield tmp_path
    kernel_folder.cache_clear()
    os.environ.pop(folders.VARIABLE, None)


def test_mlx_gets_a_folder_for_this_gpu_and_version(cuda: Path) -> None:
    found = kernel_folder()
    assert found is not None
    assert found.parent == cuda / "kernels"
    assert found.name.startswith("mlx-")
    assert found.name.endswith("-sm_90")
    assert os.environ[folders.VARIABLE] == str(found)


def test_a_folder_of_the_users_own_is_left_alone(cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = cuda / "own"
    monkeypatch.setenv(folders.VARIABLE, str(own))
    broken = _put(own, "broken", b"\x7fELF")
    assert kernel_folder() == own
    assert broken.exists()


def test_without_a_gpu_nothing_is_made(cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "architecture", lambda: None)
    assert kernel_folder() is None
    assert not (cuda / "kernels").exists()
    kernel_warmup.begin(["bfloat16"])
    assert not kernel_warmup._started


def test_a_folder_that_cannot_be_written_leaves_mlx_its_own(cuda: Path) -> None:
    (cuda / "kernels").write_text("a file where the folder should be")
    assert kernel_folder() is None
    assert folders.VARIABLE not in os.environ


@pytest.mark.parametrize("long", [False, True])
def test_what_is_indexed_survives_and_what_changed_since_goes(tmp_path: Path, long: bool) -> None:
    name = f"{'a' * 245}/rest" if long else "take"
    path = _put(tmp_path, name)
    index_kernels(tmp_path)
    assert remove_damaged(tmp_path) == []
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(bytes(data))
    assert remove_damaged(tmp_path) == [f"{name}.ptx"]
    assert not any(p.suffix in (".ptx", ".txt", ".cu") for p in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("code", "names"),
    [
        (_elf()[:-1], "f\tg\n"),
        (b"", "f\tg\n"),
        (_elf(), ""),
        (_elf(), "f\tg"),
        (b".version 8.0\n{ ret;", "f\tg\n"),
    ],
)
def test_a_kernel_cut_off_while_it_was_written_goes(tmp_path: Path, code: bytes, names: str) -> None:
    _put(tmp_path, "cut", code).with_suffix(".txt").write_text(names)
    whole = _put(tmp_path, "whole")
    text = _put(tmp_path, "text", b".version 8.0\n.entry f() { ret; }\n")
    assert remove_damaged(tmp_path) == ["cut.ptx"]
    assert whole.exists()
    assert text.exists()


@pytest.mark.parametrize("index", ["", "[]", "{", '{"take.ptx": 3}', "\x00"])
def test_a_damaged_index_costs_kernels_at_most(tmp_path: Path, index: str) -> None:
    _put(tmp_path, "take")
    (tmp_path / folders.INDEX).write_text(index)
    remove_damaged(tmp_path)
    _put(tmp_path, "take")
    index_kernels(tmp_path)
    assert remove_damaged(tmp_path) == []


def test_kernels_are_built_in_processes_of_their_own_once(
    cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(command)
            assert options["env"][kernel_warmup.INSIDE]

        def wait(self, seconds: float) -> None:
            folder = kernel_folder()
            assert folder is not None
            for command in started:
                kernel_warmup._mark(folder, *command[-2:]).touch()

    monkeypatch.setattr(kernel_warmup.subprocess, "Popen", Process)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    kernel_warmup.begin(["bfloat16"])
    kernel_warmup.begin(["bfloat16"])
    assert sorted(c[-2] for c in started) == sorted(kernel_warmup.RECIPES)
    kernel_warmup.wait()
    kernel_warmup.begin(["bfloat16"])
    assert len(started) == len(kernel_warmup.RECIPES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_recipe_runs(dtype: str) -> None:
    code = f"""
from pmetal_distill.kernel_warmup import RECIPES, run
for name in RECIPES:
    run(name, {dtype!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
