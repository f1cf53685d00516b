"""Kernels of compiled steps, built by a child process once; it ends with its parent."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from pipeline.console import Console
from pipeline.settings import TrainSettings
from pipeline.training import compiling, run
from pipeline.training.compiling import compile_ahead
from pmetal_distill import kernel_folder as folders
from tests.pipeline.training.runs import run_settings, train


@pytest.fixture
def settings(tiny_student: Path, short_cache: Path, tmp_path: Path) -> TrainSettings:
    return run_settings(student=tiny_student, cache=short_cache, out=tmp_path / "run", iters=6, val_share=0.0)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which compiling ahead pays, as far as this module can see; its folder of kernels."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setattr(folders, "kernel_folder", lambda: folder)
    monkeypatch.setattr(compiling, "on_cuda", lambda: True)
    monkeypatch.setattr(compiling, "WORTH_STEPS", 1)
    monkeypatch.setattr(run, "fits_twice", lambda *_: True)
    return folder


def losses(settings: TrainSettings) -> list[float]:
    return [json.loads(line)["loss"] for line in (settings.out / "metrics.jsonl").read_text().splitlines()]


def test_the_run_goes_over_to_compiled_steps_when_its_kernels_are_there(
    settings: TrainSettings, on_cuda: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    look = compiling.CompilingAhead.look

    def patient(ahead: compiling.CompilingAhead) -> bool:
        assert ahead.process.wait(120) == 0
        return look(ahead)

    monkeypatch.setattr(compiling.CompilingAhead, "look", patient)
    run.run_train(settings, Console())
    assert "compiled steps from batch 1 on" in capsys.readouterr().err
    (mark,) = on_cuda.iterdir()
    assert mark.name.startswith("steps-")

    # The next run with these settings compiles at once; one with others has them built first.
    monkeypatch.setattr(compiling.subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is to be built"))
    again = replace(settings, out=tmp_path / "again")
    train(again)
    monkeypatch.setattr(compiling, "on_cuda", lambda: False)
    plain = replace(settings, out=tmp_path / "plain")
    train(plain)
    assert losses(again) == pytest.approx(losses(plain), rel=1e-4)
    assert losses(settings) == pytest.approx(losses(plain), rel=1e-4)


def test_a_short_run_and_a_full_gpu_take_plain_steps(settings: TrainSettings, on_cuda: Path) -> None:
    class Plain:
        compiles = False

    for steps, room in ((0, True), (10, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiling, "_form", lambda *_: "form")
            assert compile_ahead(settings, Plain(), steps, content={}, room=lambda room=room: room) is None  # type: ignore[arg-type]
    assert not list(on_cuda.iterdir())


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = "import time; from pipeline.training.compiling import _end_with_parent as end\n"
    code += "end(); print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdout.readline()
    started = time.monotonic()
    child.stdin.close()
    assert child.wait(20) == 1
    assert time.monotonic() - started < 10
    child.stdout.close()


def test_a_failing_child_leaves_plain_steps(
    settings: TrainSettings, on_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen
    monkeypatch.setattr(
        compiling.subprocess,
        "Popen",
        lambda _, **given: popen([sys.executable, "-c", "raise SystemExit(3)"], **given),
    )
    result = train(settings)
    assert mx.isfinite(mx.array(result["loss"]))
    assert not list(on_cuda.iterdir())
