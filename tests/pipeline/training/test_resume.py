"""A run that was stopped goes on as if it never had been: the same metrics, the same weights, bit by bit."""

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pipeline.settings import LoraParameters, TrainSettings
from pipeline.training.validation import Validator
from pmetal_distill.checkpoint import list_states
from pmetal_distill.schedule import AlphaSchedule, TemperatureSchedule
from tests.pipeline.training.runs import assert_same_run, lines, run_settings, start, stop_after, train

SCHEDULES = {
    "temperature": TemperatureSchedule.linear(start=4.0, end=1.0, steps=9),
    "alpha": AlphaSchedule.step(start=0.2, end=0.9, steps=8, stages=4, warmup=2),
}
LORA = {"fine_tune_type": "lora", "lora_parameters": LoraParameters(rank=2, dropout=0.3)}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulated": {"grad_accumulation_steps": 3, "steps_per_report": 5},
    "scheduled": {**SCHEDULES, "optimizer": "sgd", "num_layers": 1},
    "lora with dropout": {**LORA, "fuse": True},
    "dora, recomputed, accumulated": {
        **LORA,
        "fine_tune_type": "dora",
        "grad_checkpoint": True,
        "grad_accumulation_steps": 3,
    },
    "muon, without clipping": {
        "optimizer": "muon",
        "grad_clip": None,
        "lr_schedule": "constant",
        "warmup": 0,
    },
}
Make = Callable[..., TrainSettings]


class PowerCutError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def make(tiny_student: Path, short_cache: Path, tmp_path: Path) -> Make:
    """Settings of a run in a folder of this name."""
    return lambda name, **changes: run_settings(
        student=tiny_student, out=tmp_path / name, **({"cache": short_cache} | changes)
    )


def stopped(settings: TrainSettings, step: int) -> None:
    """Runs until the process fails behind so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step, PowerCutError)
        with pytest.raises(PowerCutError):
            train(settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_goes_on_exactly(variant: str, make: Make) -> None:
    train(make("straight", **VARIANTS[variant]))
    settings = make("stopped", **VARIANTS[variant])
    stopped(settings, 3)
    resumed = replace(settings, resume=True)
    stopped(replace(resumed, prefetch=0), 6)
    train(replace(resumed, prefetch=5))
    assert_same_run(make("straight").out, settings.out)


def test_the_best_is_remembered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([1.0, 2.0, 3.0] * 2)
    monkeypatch.setattr(Validator, "run", lambda self: {"val_kl@1": next(figures)})
    train(make("straight"))
    settings = make("stopped")
    stopped(settings, 9)
    result = train(replace(settings, resume=True))
    assert result["best_iteration"] == 4
    assert [file.number for file in list_states(settings.out / "checkpoints")] == [4, 10, 12]
    assert_same_run(make("straight").out, settings.out)


def test_a_resumed_run_takes_no_more_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, int] = {}
    monkeypatch.setattr(Validator, "run", lambda self: held.update(now=mx.get_active_memory()) or {})
    before = mx.get_active_memory()
    train(make("straight"))
    straight = held["now"] - before
    settings = make("stopped")
    stopped(settings, 7)
    before = mx.get_active_memory()
    train(replace(settings, resume=True))
    assert held["now"] - before < 1.1 * straight


def test_beside_a_live_teacher(make: Make, tiny_teacher: Path, text_file: Path) -> None:
    live = {
        "cache": None,
        "teacher": str(tiny_teacher),
        "data": str(text_file),
        "max_seq_len": 16,
        "iters": 6,
    }
    train(make("straight", **live))
    settings = make("stopped", **live)
    stopped(settings, 5)
    train(replace(settings, resume=True))
    assert_same_run(make("straight").out, settings.out)


def test_stopped_before_the_first_checkpoint_it_begins_anew(make: Make) -> None:
    train(make("straight", iters=4))
    settings = make("stopped", iters=4)
    stopped(settings, 1)
    assert len(lines(settings.out)) == 1
    train(replace(settings, resume=True))
    assert_same_run(make("straight").out, settings.out)


def test_lines_behind_the_checkpoint_and_torn_ones_go(make: Make) -> None:
    train(make("straight"))
    settings = make("stopped")
    stopped(settings, 7)
    assert [line["iteration"] for line in lines(settings.out)] == [1, 2, 3, 4, 5, 6, 7]
    with (settings.out / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "loss": 1\xff')
    train(replace(settings, resume=True))
    assert_same_run(make("straight").out, settings.out)


def test_the_clock_goes_on_too(make: Make) -> None:
    settings = make("stopped")
    stopped(settings, 10)
    before = json.loads((settings.out / "metrics.jsonl").read_text().splitlines()[-1])
    train(replace(settings, resume=True))
    after = [json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in after]
    assert seconds == sorted(seconds)
    assert after[9]["seconds"] == before["seconds"]


def killed_at(settings: TrainSettings, line: int) -> bool:
    """Runs it until so many lines of metrics stand, then SIGKILL; whether that was before it had finished."""
    metrics = settings.out / "metrics.jsonl"
    began = metrics.stat().st_mtime_ns if metrics.exists() else 0
    process = start(settings)
    try:
        while process.is_alive():
            fresh = metrics.exists() and metrics.stat().st_mtime_ns != began
            if fresh and metrics.read_bytes().count(b"\n") >= line:
                time.sleep(random.Random(line).uniform(0, 0.01))
                break
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0
    finally:
        process.close()


def kill_and_compare(make: Make, variant: dict[str, Any], *, kills: int, iters: int, seed: int) -> None:
    """A run killed at random lines, each time resumed with another prefetch, against one that was not."""
    rng = random.Random(seed)
    train(make("straight", iters=iters, **variant))
    settings = make("killed", iters=iters, **variant)
    died = 0
    for line in sorted(rng.sample(range(1, iters), kills)):
        again = replace(settings, resume=True, prefetch=rng.randrange(4))
        died += killed_at(again, line)
    assert died >= kills // 2
    train(replace(settings, resume=True))
    assert_same_run(make("straight").out, settings.out)


HARDEST = {**SCHEDULES, **LORA, "grad_accumulation_steps": 3}


def test_sigkill_at_ten_random_steps(make: Make) -> None:
    kill_and_compare(make, HARDEST, kills=10, iters=24, seed=int(time.time()))


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sigkill_at_many_random_steps(variant: str, make: Make) -> None:
    changes = {**VARIANTS[variant], "steps_per_report": 1}
    kill_and_compare(make, changes, kills=30, iters=60, seed=list(VARIANTS).index(variant))
