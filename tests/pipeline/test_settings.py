"""The settings of both stages: ranges, mlx-lm's keys, and that defaults and help are complete."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config, resolve, save_config
from pipeline.config_schema import key_names
from pipeline.settings import CacheSettings, LrSchedule, TrainSettings
from pmetal_distill.schedule import AlphaSchedule, TemperatureSchedule
from schemas.errors import UsageError

CACHE = {"teacher": "t", "data": "d", "out": "o"}
TRAIN = {"student": "s", "cache": "c", "out": "o"}


def cache(**values: Any) -> CacheSettings:
    return resolve(CacheSettings, {}, CACHE | values)


def train(**values: Any) -> TrainSettings:
    return resolve(TrainSettings, {}, TRAIN | values)


def test_every_key_of_mlx_lm_lora_is_taken_or_explained() -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    explained = TrainSettings.foreign_keys.keys() | TrainSettings.left_out_keys.keys()
    known = key_names(TrainSettings).keys() | explained
    assert set(CONFIG_DEFAULTS) - known == set()
    assert not key_names(TrainSettings).keys() & explained
    assert not key_names(CacheSettings).keys() & CacheSettings.foreign_keys.keys()


def test_a_configuration_of_mlx_lm_lora_is_read(tmp_path: Path) -> None:
    file = tmp_path / "lora.yaml"
    file.write_text("""
model: mlx-community/Qwen3-0.6B-4bit
optimizer: adamw
optimizer_config:
  adamw: {betas: [0.9, 0.98], eps: 1e-6}
seed: 0
batch_size: 4
iters: 1000
learning_rate: 1e-5
steps_per_report: 10
adapter_path: adapters
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
""")
    made = resolve(TrainSettings, load_config(file, TrainSettings), {"cache": "c"})
    assert (made.student, made.out) == ("mlx-community/Qwen3-0.6B-4bit", Path("adapters"))
    assert made.lr_schedule == LrSchedule("cosine_decay", (1e-5, 1000.0, 1e-7), 100, 1e-7)
    assert made.optimizer_config == {"adamw": {"betas": [0.9, 0.98], "eps": 1e-6}}


def test_what_cannot_be_done_is_refused_and_explained(tmp_path: Path) -> None:
    file = tmp_path / "lora.yaml"
    file.write_text("model: m\nhf_dataset: {name: a/b}\n")
    with pytest.raises(UsageError, match="download the Parquet files"):
        load_config(file, TrainSettings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache": None}, "found neither"),
        ({"teacher": "t"}, "found both"),
        ({"cache": None, "teacher": "t"}, "given together"),
        ({"data": "d"}, "given together"),
    ],
)
def test_targets_come_from_one_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(**values)


def test_a_temperature_schedule_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "temperature: {kind: linear, start: 4, end: 1.0, steps: 1000, warmup: 5}\n"
        "alpha: {kind: step, start: 0.2, end: 1, steps: 10, stages: 2}\n"
    )
    made = resolve(TrainSettings, load_config(file, TrainSettings), TRAIN)
    assert made.temperature == TemperatureSchedule.linear(start=4.0, end=1.0, steps=1000, warmup=5)
    assert made.alpha == AlphaSchedule.step(start=0.2, end=1.0, steps=10, stages=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("temperature: {kind: linear, start: 4, end: 0, steps: 10}", "end must be positive, found 0"),
        ("alpha: {kind: linear, start: 0, end: 2, steps: 10}", "end must be from 0 to 1, found 2"),
        ("temperature: {kind: linear, start: 4, end: 1}", "steps must be at least 1, found 0"),
        ("temperature: {kind: square, start: 4, end: 1, steps: 3}", "must be one of 'constant', 'linear'"),
        ("alpha: {kind: linear, start: 0, steps: 3}", "must have the key 'end', found none"),
        ("alpha: {kind: linear, start: 0, end: 1, steps: 3, hodl: 1}", "did you mean 'hold'?"),
    ],
)
def test_an_impossible_schedule_is_refused_by_its_key(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"iters: 3\n{line}\n")
    with pytest.raises(UsageError) as caught:
        load_config(file, TrainSettings)
    assert str(caught.value).startswith(f"{file}:2: '{line.split(':')[0]}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "cls"),
    [
        (cache(hidden_layers=(6, -1), tail="bucket"), CacheSettings),
        (
            train(
                temperature=TemperatureSchedule("linear", 4.0, 1.0, 10), hidden_layers=(1,), hidden_loss="mse"
            ),
            TrainSettings,
        ),
    ],
)
def test_resolved_settings_survive_a_file(tmp_path: Path, settings: Any, cls: Any) -> None:
    save_config(settings, tmp_path / "config.yaml")
    assert resolve(cls, load_config(tmp_path / "config.yaml", cls), {}) == settings


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_seq_len": 1}, "max_seq_len: must be at least 2, found 1"),
        ({"batch_size": 0}, "batch_size: must be at least 1, found 0"),
        ({"top_k": 0}, "top_k: must be at least 1"),
        ({"sketch_rank": -3}, "sketch_rank: must be at least 1"),
        ({"sketch_step": 0.0}, "sketch_step: must be a positive number"),
        ({"sketch_step": math.nan}, "sketch_step: must be a positive number"),
        ({"calibration_tokens": 100}, "calibration_tokens: must be at least sketch_rank = 256, found 100"),
        ({"tail": "all"}, "--tail: must be one of 'none', 'bucket', 'sketch'"),
        ({"zstd_level": 23}, "zstd_level: must be from 1 to 22"),
        ({"hidden_layers": (3, 3)}, "hidden_layers: must be distinct layers"),
        ({"sequences_per_shard": 0}, "sequences_per_shard: must be at least 1"),
        ({"head_chunk": 0}, "head_chunk: must be at least 1"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"split": "dev"}, "--split: must be one of 'train', 'valid', 'test'"),
    ],
)
def test_cache_settings_out_of_range(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        cache(**values)
    assert str(caught.value).startswith(expected)
    assert ";" in str(caught.value)


def test_calibration_matters_only_for_the_sketch() -> None:
    assert cache(tail="bucket", calibration_tokens=1).calibration_tokens == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": 0.0}, "temperature: must be greater than 0, found 0.0"),
        ({"temperature": -1}, "temperature: must be greater than 0, found -1.0"),
        ({"temperature": math.nan}, "temperature: must be greater than 0"),
        ({"alpha": 1.01}, "alpha: must be in [0, 1], found 1.01"),
        ({"loss": "kl"}, "--loss: must be one of 'forward_kl', 'reverse_kl'"),
        ({"loss_parameter": 1.0}, "loss_parameter: must be in (0, 1)"),
        ({"hidden_weight": -0.1}, "hidden_weight: must be zero or positive"),
        ({"hidden_loss": "l1"}, "--hidden-loss: must be one of 'mse', 'cosine' or null"),
        ({"learning_rate": 0.0}, "learning_rate: must be a positive number"),
        ({"learning_rate": math.inf}, "learning_rate: must be a positive number"),
        ({"grad_clip": 0.0}, "grad_clip: must be a positive number"),
        ({"warmup": -1}, "warmup: must be at least 0"),
        ({"iters": 0}, "iters: must be at least 1"),
        ({"grad_accumulation_steps": 0}, "grad_accumulation_steps: must be at least 1"),
    ],
)
def test_train_settings_out_of_range(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        train(**values)
    assert str(caught.value).startswith(expected)
    assert ";" in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LrSchedule("cosine_decay", ()),
        lambda: LrSchedule("cosine_decay", (1e-5,), warmup=-1),
        lambda: LrSchedule("cosine_decay", (1e-5,), warmup_init=-1.0),
    ],
)
def test_nested_settings_out_of_range(make: Any) -> None:
    with pytest.raises(UsageError, match="must be"):
        make()


@pytest.mark.parametrize("cls", [CacheSettings, TrainSettings])
def test_every_setting_but_nested_ones_has_a_help_text(cls: Any) -> None:
    without = {f.name for f in dataclasses.fields(cls) if not f.metadata.get("help", "").endswith(".")}
    assert without <= {"optimizer_config", "lora_parameters"}


def test_losses_are_those_of_the_library() -> None:
    from typing import get_args

    from pipeline.settings import Loss
    from pmetal_distill.losses.divergences import LOSS_NAMES

    assert set(get_args(Loss)) == set(LOSS_NAMES)


def test_settings_and_configuration_import_no_mlx() -> None:
    code = "import sys, pipeline.config, pipeline.settings; sys.exit('mlx' in str(sorted(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
