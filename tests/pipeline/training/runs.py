"""Runs of a tiny student for the tests of this folder, in this process or in one that can be killed."""

import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.console import Console
from pipeline.settings import TrainSettings

QUIET = Console(quiet=True)
# What differs between equal runs; the peak of memory is that of the whole process.
TIMES = ("seconds", "tokens_per_second", "data_wait_share", "peak_memory_gb")
PRELOADED = [
    "pmetal_distill",
    "pipeline.training.run",
    "pipeline.training.output",
    "pipeline.training.source",
    "pipeline.training.student",
    "mlx_lm.utils",
    "mlx_lm.models.llama",
    "mlx_lm.tuner.utils",
    "transformers",
]


def run_settings(*, student: Path, **changes: Any) -> TrainSettings:
    """A run of twelve batches that reports each, evaluates each fourth, and saves each second."""
    values: dict[str, Any] = {
        "iters": 12,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "steps_per_report": 1,
        "steps_per_eval": 4,
        "val_share": 0.2,
        "save_every": 2,
    }
    return TrainSettings(student=str(student), **(values | changes))


def train(settings: TrainSettings, console: Console = QUIET) -> dict[str, Any]:
    """Runs it in this process."""
    from pipeline.training.run import run_train

    return run_train(settings, console)


def start(settings: TrainSettings) -> BaseProcess:
    """Runs it in a process of its own, which is a fork of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_train_silently, args=(settings,), daemon=True)
    process.start()
    return process


def _train_silently(settings: TrainSettings) -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    train(settings)


def lines(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what a clock decides."""
    text = (out / "metrics.jsonl").read_text()
    return [_without(json.loads(line), TIMES) for line in text.splitlines()]


def figures(out: Path) -> dict[str, Any]:
    """What a finished run printed, without times and places."""
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return {name: value for name, value in result.items() if name not in TIMES and not isinstance(value, str)}


def weights(out: Path) -> dict[str, bytes]:
    """The bytes of every tensor that a run has written: model and adapters."""
    import mlx.core as mx

    files = sorted([*out.glob("model/*.safetensors"), *out.glob("*.safetensors")])
    assert files
    tensors = {(file.name, name): t for file in files for name, t in mx.load(str(file)).items()}
    raw = {name: t.view(mx.uint16) if t.dtype == mx.bfloat16 else t for name, t in tensors.items()}
    return {"/".join(name): np.array(tensor).tobytes() for name, tensor in raw.items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Same lines of metrics, each iteration once; same figures in the end; same weights, bit by bit."""
    assert lines(one) == lines(other)
    assert figures(one) == figures(other)
    numbers = [line["iteration"] for line in lines(one)]
    assert numbers == sorted(set(numbers))
    assert weights(one) == weights(other)


def stop_after(monkeypatch: Any, step: int, error: Callable[[], BaseException]) -> None:
    """Lets the distiller's step after `step` of them fail."""
    from pmetal_distill.distiller import Distiller

    inner, count = Distiller.step, 0

    def step_or_fail(self: Distiller, batch: Any, **named: Any) -> Any:
        nonlocal count
        if count == step:
            raise error()
        count += 1
        return inner(self, batch, **named)

    monkeypatch.setattr(Distiller, "step", step_or_fail)


def _without(line: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in names}
