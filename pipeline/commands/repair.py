"""`repair`: set damaged shards aside, so that `cache --resume` writes exactly them again."""

from pathlib import Path

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console


@click.command("repair")
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Say what would be moved, move nothing.")
@console_options
def command(cache: Path, dry_run: bool, console: Console) -> None:
    """Move damaged shards of CACHE into its `quarantine` folder; nothing is deleted."""
    from pipeline.checking import repair, repair_text

    report = repair(cache, console, dry_run=dry_run)
    console.result(report, repair_text(report))
