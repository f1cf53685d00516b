"""`verify`: is every byte of a cache what was written, and is it what the teacher says?"""

from pathlib import Path

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console
from pipeline.options import PLACE
from schemas.errors import UsageError


@click.command("verify")
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--replay", "rows", type=int, help="Run the teacher again and compare this many random rows.")
@click.option("--teacher", type=PLACE, help="With --replay: the teacher, a folder, hub id or .gguf.")
@click.option("--data", type=PLACE, help="With --replay: check too that the cache was made from this text.")
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="train",
    show_default=True,
    help="Split of --data.",
)
@click.option("--seed", default=0, show_default=True, help="Of the choice of rows.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the tokenizer.")
@console_options
def command(
    cache: Path,
    rows: int | None,
    teacher: str | None,
    data: str | None,
    split: str,
    seed: int,
    trust_remote_code: bool,
    console: Console,
) -> None:
    """Check every hash, page checksum and invariant of CACHE. Exit code 1 when something is wrong.

    With --replay N --teacher M: also that M made it. Its weights, tokenizer and chat template are compared by
    their fingerprints, then what the cache holds for N random tokens with what M says about them.
    """
    if (rows is None) != (teacher is None) or (data is not None and rows is None):
        raise UsageError(
            "verify: --replay must come with --teacher, and --data with both; give them together"
        )
    from pipeline.checking import findings_text, verify
    from pipeline.replay import ReplaySettings, add_replay, replay_text

    replay = None
    if rows is not None and teacher is not None:
        replay = ReplaySettings(teacher, rows, seed, data, split, trust_remote_code)
    report = verify(cache, console)
    lines = []
    if replay is not None:
        add_replay(report, cache, replay, console)
        lines = [replay_text(report)]
    console.result(report, "\n".join([findings_text(report), *lines]))
    if not report["ok"]:
        raise SystemExit(1)
