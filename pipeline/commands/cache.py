"""`cache`: stage one."""

from pathlib import Path
from typing import Any

import click

from pipeline.commands.shared import console_options
from pipeline.config import load_config, resolve
from pipeline.console import Console
from pipeline.options import given, settings_options
from pipeline.settings import CacheSettings


@click.command("cache")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="YAML file of the options below.")
@settings_options(CacheSettings)
@console_options
def command(config: Path | None, console: Console, **options: Any) -> None:
    """Run the teacher once and keep what it says about every token. Option beats file beats default."""
    settings = resolve(CacheSettings, load_config(config, CacheSettings) if config else {}, given(options))
    from pipeline.cache import run_cache

    if result := run_cache(settings, console):
        console.result(result)
