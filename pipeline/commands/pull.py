"""`pull`: a cache out of object storage."""

from pathlib import Path

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console


@click.command("pull")
@click.argument("url")
@click.argument("cache", type=click.Path(path_type=Path))
@console_options
def command(url: str, cache: Path, console: Console) -> None:
    """Copy the cache at URL (s3://, gs://, hf://) to the folder CACHE. Run again after an interruption."""
    from pipeline.transfer import pull

    console.result(pull(url, cache, console))
