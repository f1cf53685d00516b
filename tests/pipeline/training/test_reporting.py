"""Services that figures go to, with a module that stands for wandb; and the file they always go to."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.settings import TrainSettings
from pipeline.training.reporting import Metrics
from schemas.errors import CheckpointError, UsageError
from tests.pipeline.training.runs import lines, run_settings, train

Make = Callable[..., TrainSettings]


@pytest.fixture
def make(tiny_student: Path, short_cache: Path, tmp_path: Path) -> Make:
    values: dict[str, Any] = {"student": tiny_student, "cache": short_cache, "out": tmp_path / "run"}
    return lambda **changes: run_settings(**(values | {"iters": 4, "steps_per_eval": 2} | changes))


class Service(SimpleNamespace):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__(began=[], logged=[])

    def init(self, **facts: Any) -> None:
        self.began.append(facts)

    def log(self, figures: dict[str, Any], *, step: int) -> None:
        self.logged.append((step, figures))


def test_services_get_every_figure(make: Make, monkeypatch: Any) -> None:
    from mlx_lm.tuner import callbacks

    wandb, swanlab = Service(), Service()
    monkeypatch.setattr(callbacks, "wandb", wandb)
    monkeypatch.setattr(callbacks, "swanlab", swanlab)
    train(make(report_to="wandb, SwanLab", project_name="distil", steps_per_report=2))
    assert wandb.began[0]["project"] == swanlab.began[0]["project"] == "distil"
    assert wandb.began[0]["config"]["learning_rate"] == 1e-3
    assert wandb.logged == swanlab.logged
    merged: dict[int, dict[str, Any]] = {}
    for step, figures in wandb.logged:
        merged.setdefault(step, {}).update(figures)
    text = (make().out / "metrics.jsonl").read_text()
    assert list(merged.values()) == [json.loads(line) for line in text.splitlines()]
    assert {"loss", "val_kl@1"} <= merged[2].keys()


def test_a_missing_package_is_told_before_anything_is_done(make: Make, monkeypatch: Any) -> None:
    from mlx_lm.tuner import callbacks

    monkeypatch.setattr(callbacks, "wandb", None)
    with pytest.raises(
        UsageError, match="report_to: the package 'wandb' must be installed, found none; run 'pip"
    ):
        train(make(report_to="wandb"))
    assert not make().out.exists()


def test_an_unknown_service_is_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="report_to: must be wandb or swanlab, found 'tensorboard'"):
        make(report_to="wandb,tensorboard")


def test_reports_and_evaluations_of_one_iteration_are_one_line(make: Make) -> None:
    train(make(steps_per_report=3))
    found = lines(make().out)
    assert [line["iteration"] for line in found] == [2, 3, 4]
    assert "loss" not in found[0]
    assert "val_loss" not in found[1]
    assert {"loss", "val_loss"} <= found[2].keys()


def test_metrics_that_cannot_be_written_are_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: must be written in full, found .*--resume"):
        Metrics(tmp_path / "missing" / "metrics.jsonl", after=0)
