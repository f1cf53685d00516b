"""`train`: stage two."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.commands.shared import console_options
from pipeline.config import read_config, resolve
from pipeline.console import Console
from pipeline.options import given, settings_options
from pipeline.settings import TrainSettings


@click.command("train")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="YAML file of the options below.")
@settings_options(TrainSettings)
@console_options
def command(config: Path | None, console: Console, **options: Any) -> None:
    """Train a student from a cache or beside a live teacher. Option beats file beats default."""
    typed = given(options)
    settings = resolve(TrainSettings, from_file(config, typed, console) if config else {}, typed)
    from pipeline.training.run import run_train

    if result := run_train(settings, console):
        console.result(result)


def from_file(config: Path, typed: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """The settings in a file, of `mlx_lm.lora` too, less those without a use here; says which these are."""
    values, left_out = read_config(config, TrainSettings)
    if (typed.get("cache") or values.get("cache")) and not typed.get("teacher") and "teacher" not in values:
        for name in ("data", "mask_prompt", "max_seq_len"):
            if values.get(name) and name not in typed:
                del values[name]
                left_out[name] = "the cache decides"
    if left_out:
        parts = [f"{', '.join(keys)} ({why})" for why, keys in _by_reason(left_out).items()]
        console.note(f"{config}: left out {'; '.join(parts)}")
    return values


def _by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for key, why in left_out.items():
        reasons.setdefault(why, []).append(key)
    return reasons
