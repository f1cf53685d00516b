"""`push`: a cache into object storage."""

from pathlib import Path

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console


@click.command("push")
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("url")
@console_options
def command(cache: Path, url: str, console: Console) -> None:
    """Copy CACHE to URL (s3://, gs://, hf://). Run again, it moves only what is missing there."""
    from pipeline.transfer import push

    console.result(push(cache, url, console))
