"""`status`: how far a cache or a run has come."""

import time
from pathlib import Path

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console
from schemas.errors import UsageError


@click.command("status")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--watch", type=float, help="Look again every so many seconds until it is complete.")
@console_options
def command(folder: Path, watch: float | None, console: Console) -> None:
    """Show how far the cache or run in FOLDER has come, how fast, and when it will be done."""
    if watch is not None and watch <= 0:
        raise UsageError(f"--watch: must be a positive number of seconds, found {watch:g}; 10 is usual")
    from pipeline.status import status, status_text

    facts = status(folder)
    console.result(facts, status_text(facts))
    while watch is not None and not facts["complete"]:
        time.sleep(watch)
        facts = status(folder)
        console.result(facts, "\n" + status_text(facts))
