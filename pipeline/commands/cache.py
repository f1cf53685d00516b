"""`cache`: stage one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.commands.shared import console_options
from pipeline.config import load_config, resolve
from pipeline.console import Console, aligned
from pipeline.inspection import SIZES, stretches_text
from pipeline.options import given, settings_options
from pipeline.settings import CacheSettings

# In the order in which they are shown.
LABELS = {
    "new_tokens": "tokens written now",
    "wall_seconds": "seconds, whole command",
    "wall_tokens_per_second": "tokens/s, whole command",
    "reading_seconds": "seconds reading text",
    "calibration_seconds": "seconds calibrating",
    "seconds": "seconds, calibration and pass",
    "tokens_per_second": "tokens/s, pass alone",
    "cache": "cache",
    "sequences": "sequences",
    "tokens": "tokens",
    "trained_tokens": "trained tokens",
    "hidden_bytes_per_token": "bytes/token, hidden states",
    **SIZES,
}


@click.command("cache")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="YAML file of the options below.")
@settings_options(CacheSettings)
@console_options
def command(config: Path | None, console: Console, **options: Any) -> None:
    """Run the teacher once and keep what it says about every token. Option beats file beats default."""
    settings = resolve(CacheSettings, load_config(config, CacheSettings) if config else {}, given(options))
    from pipeline.cache import run_cache

    if result := run_cache(settings, console):
        console.result(result, summary_text(result))


def summary_text(result: Mapping[str, Any]) -> str:
    """What `run_cache` returns, in words."""
    text = aligned((label, result[name]) for name, label in LABELS.items())
    by_stretch = stretches_text(result["stretches"])
    return f"{text}\n\n{by_stretch}" if by_stretch else text
