"""Runs in every precision: resumed bit by bit, refused in another, and of versions without a choice."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pipeline.settings import LoraParameters, TrainSettings
from pmetal_distill.checkpoint import TrainingState, list_states, write_state
from schemas.errors import CheckpointError
from tests.pipeline.training.runs import assert_same_run, run_settings, stop_after, train
from tests.tiny import build_tiny_model

LORA: dict[str, Any] = {"fine_tune_type": "lora", "lora_parameters": LoraParameters(rank=2), "fuse": True}
Make = Callable[..., TrainSettings]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One student in three types on disk."""
    root = tmp_path_factory.mktemp("students")
    found = {"float32": build_tiny_model(root / "float32", seed=1, num_layers=2)}
    for name in ("bfloat16", "float16"):
        found[name] = build_tiny_model(root / name, seed=1, num_layers=2)
        file = str(found[name] / "model.safetensors")
        weights: Any = mx.load(file)
        mx.save_safetensors(file, {n: a.astype(getattr(mx, name)) for n, a in weights.items()})
    return found


@pytest.fixture
def make(
    students: dict[str, Path], short_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Make:
    """Settings of a run, on what looks like a GPU but computes as a CPU does: without races."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    common: dict[str, Any] = {"cache": str(short_cache), "iters": 6, "steps_per_eval": 3}
    return lambda name, kind, **changes: run_settings(
        student=students[kind], out=tmp_path / name, **(common | changes)
    )


def stopped(settings: TrainSettings, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train(settings)


@pytest.mark.parametrize(
    "more", [{}, {"grad_accumulation_steps": 2}, LORA], ids=["full", "accumulated", "lora"]
)
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("bfloat16", None), ("float16", None), ("bfloat16", "bfloat16"), ("float32", "mixed")],
)
def test_a_stopped_run_ends_as_one_that_was_not(
    make: Make, kind: str, precision: Any, more: dict[str, Any]
) -> None:
    whole, cut = (make(name, kind, precision=precision, **more) for name in ("whole", "cut"))
    result = train(whole)
    stopped(cut, 3)
    train(replace(cut, resume=True))
    assert_same_run(whole.out, cut.out)
    assert result["precision"]["name"] == (precision or "mixed")
    assert result["precision"]["stored"] == kind
    (state,) = list_states(cut.out / "checkpoints")[-1:]
    types = {array.dtype for array in state.read().part("trained").values()}
    assert types == {mx.bfloat16 if precision == "bfloat16" else mx.float32}


def test_a_run_is_not_resumed_in_another_precision(make: Make) -> None:
    settings = make("run", "bfloat16")
    stopped(settings, 3)
    with pytest.raises(
        CheckpointError, match="precision: must be 'mixed', as when this run began, found 'bfloat16'"
    ):
        train(replace(settings, resume=True, precision="bfloat16"))
    train(replace(settings, resume=True, precision="mixed"))


def of_before(settings: TrainSettings, dtype: mx.Dtype) -> None:
    """Makes the newest checkpoint one of a version that had no precision to choose."""
    folder = settings.out / "checkpoints"
    newest = list_states(folder)[-1]
    state = newest.read()
    record = {name: value for name, value in state.record.items() if name != "precision"}
    record["settings"] = {n: v for n, v in record["settings"].items() if n not in ("precision", "dtype")}
    arrays = {
        name: array.astype(dtype) if name.startswith(("trained", "optimizer.student")) else array
        for name, array in state.arrays.items()
    }
    newest.path.unlink()
    write_state(folder, newest.number, TrainingState(arrays, json.loads(json.dumps(record))))


@pytest.mark.parametrize(
    ("kind", "dtype", "name"), [("float32", mx.float32, "float32"), ("bfloat16", mx.bfloat16, "bfloat16")]
)
def test_checkpoints_of_before_are_gone_on_with(make: Make, kind: str, dtype: mx.Dtype, name: str) -> None:
    settings = make("run", kind)
    stopped(settings, 3)
    of_before(settings, dtype)
    result = train(replace(settings, resume=True))
    assert result["precision"]["name"] == name
    assert mx.isfinite(mx.array(result["loss"]))


def test_a_checkpoint_in_float16_is_refused(make: Make) -> None:
    settings = make("run", "float16")
    stopped(settings, 3)
    of_before(settings, mx.float16)
    with pytest.raises(CheckpointError, match="must be float32 or bfloat16, found float16"):
        train(replace(settings, resume=True))
