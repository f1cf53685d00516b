"""`verify`: is every byte of a cache what was written?"""

from pathlib import Path

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console


@click.command("verify")
@click.argument("cache", type=click.Path(path_type=Path))
@console_options
def command(cache: Path, console: Console) -> None:
    """Check every hash, page checksum and invariant of CACHE. Exit code 1 when something is wrong."""
    from pipeline.checking import findings_text, verify

    report = verify(cache, console)
    console.result(report, findings_text(report))
    if not report["ok"]:
        raise SystemExit(1)
