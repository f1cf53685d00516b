"""`train`: stage two."""

from pathlib import Path
from typing import Any

import click

from pipeline.commands.shared import console_options
from pipeline.config import load_config, resolve
from pipeline.console import Console
from pipeline.options import given, settings_options
from pipeline.settings import TrainSettings


@click.command("train")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="YAML file of the options below.")
@settings_options(TrainSettings)
@console_options
def command(config: Path | None, console: Console, **options: Any) -> None:
    """Train a student from a cache or beside a live teacher. Option beats file beats default."""
    settings = resolve(TrainSettings, load_config(config, TrainSettings) if config else {}, given(options))
    from pipeline.training.run import run_train

    if result := run_train(settings, console):
        console.result(result)
