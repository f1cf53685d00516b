"""DistillConfig: the defaults, round trips, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pmetal_distill.config import DistillConfig
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.hidden import HiddenStateLoss
from pmetal_distill.losses.taid import TaidSchedule
from pmetal_distill.schedule import AlphaSchedule, TemperatureSchedule
from schemas.errors import UsageError

FULL = DistillConfig(
    temperature=TemperatureSchedule.linear(start=4.0, end=1.0, steps=1000),
    alpha=AlphaSchedule.constant(0.9, warmup=10, warmup_start=0.1),
    loss="forward_kl",
    hidden_loss=HiddenStateLoss.COSINE,
    hidden_layers=(6, 12, -1),
    student_layers=(1, 2, 3),
    taid=TaidSchedule(start=0.2),
    taid_steps=100,
    accumulation_steps=4,
    max_grad_norm=1.0,
    chunk_tokens=64,
    compiled=False,
)


def test_defaults_are_those_of_the_crate() -> None:
    config = DistillConfig()
    assert (config.temperature, config.alpha, config.hidden_loss, config.hidden_weight) == (
        2.0,
        0.5,
        None,
        0.1,
    )
    assert config.divergence == Divergence("forward_kl")
    assert (config.temperature_at(10**6), config.alpha_at(0)) == (2.0, 0.5)


@pytest.mark.parametrize(
    "config", [DistillConfig(), FULL, DistillConfig(loss="jensen_shannon", loss_parameter=0.3)]
)
def test_survives_yaml(config: DistillConfig) -> None:
    text = yaml.safe_dump(config.to_dict())
    assert DistillConfig.from_dict(yaml.safe_load(text)) == config


def test_schedules_are_read_at_updates() -> None:
    assert [FULL.temperature_at(n) for n in (0, 500, 2000)] == [4.0, 2.5, 1.0]
    assert FULL.alpha_at(5) == pytest.approx(0.5)


def test_lists_and_names_are_accepted() -> None:
    config = DistillConfig.from_dict({"hidden_loss": "mse", "hidden_layers": [1, 2]})
    assert config.hidden_loss is HiddenStateLoss.MSE
    assert config.hidden_layers == (1, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temprature": 3.0}, "unknown key 'temprature'; did you mean 'temperature'"),
        ({"zzz": 3.0}, "unknown key 'zzz'; known keys: temperature, alpha"),
        ({"temperature": 0.0}, "temperature must be positive, or a TemperatureSchedule; found 0.0"),
        ({"temperature": "2"}, "temperature must be positive, .*found '2'"),
        ({"temperature": True}, "temperature must be positive, .*found True"),
        ({"temperature": {"kind": "linear", "start": 4.0, "end": -1.0, "steps": 5}}, "end must be positive"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1"),
        ({"alpha": float("nan")}, "alpha must be from 0 to 1"),
        ({"loss": "kl"}, "loss must be one of forward_kl"),
        ({"loss": 3}, "loss must be a name"),
        ({"loss": "jensen_shannon", "loss_parameter": 1.0}, "beta must lie strictly between 0 and 1"),
        ({"hidden_loss": "l1", "hidden_layers": [1]}, "hidden_loss must be mse or cosine; found 'l1'"),
        ({"hidden_loss": "mse"}, "hidden_layers must be given with hidden_loss"),
        ({"hidden_layers": [1]}, "hidden_loss must be given with hidden_layers"),
        ({"hidden_loss": "mse", "hidden_layers": "all"}, "hidden_layers must be a list of whole numbers"),
        (
            {"hidden_loss": "mse", "hidden_layers": [1], "student_layers": [1, 2]},
            "student_layers must be 1 long",
        ),
        ({"hidden_weight": -1.0}, "hidden_weight must be at least 0"),
        ({"accumulation_steps": 0}, "accumulation_steps must be a whole number of at least 1; found 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive; found 0.0"),
        ({"taid": {"start": 0.4}}, "taid must be used with forward_kl and taid_steps >= 1"),
        ({"taid": {"begin": 0.4}, "taid_steps": 5}, "taid must be of the keys"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DistillConfig.from_dict(values)


def test_a_file_reads_back_and_is_strict(tmp_path: Path) -> None:
    config = DistillConfig(temperature=TemperatureSchedule.linear(start=4.0, end=1.0, steps=10), alpha=1e-5)
    config.to_yaml(tmp_path / "c.yaml")
    assert DistillConfig.from_yaml(tmp_path / "c.yaml") == config
    for text, found in (("alpha: 0.1\nalpha: 0.2\n", "line 1"), ("alhpa: 0.1\n", "did you mean 'alpha'")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UsageError, match=found):
            DistillConfig.from_yaml(tmp_path / "c.yaml")
