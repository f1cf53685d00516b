"""`import`: a cache out of what another tool has written."""

from pathlib import Path
from typing import Any

import click

from pipeline.commands.shared import console_options
from pipeline.config import resolve
from pipeline.console import Console
from pipeline.exchange.settings import FORMATS, ImportSettings
from pipeline.options import given, settings_options


@click.command("import")
@click.argument("format", type=click.Choice(FORMATS))
@click.argument("source", type=click.Path(path_type=Path))
@settings_options(ImportSettings, positional=("format", "source"))
@console_options
def command(format: str, source: Path, console: Console, **options: Any) -> None:
    """Make a cache of SOURCE, what another tool has recorded of a teacher.

    \b
    vllm        .jsonl[.zst] with prompt_logprobs, a RequestOutput or server response a line
    openai      .jsonl[.zst] with top_logprobs of completions (echo) or chats
    distillkit  folder of compressed logits, Parquet or Arrow
    dwq         folder of one split of mlx_lm.dwq --target-dir; its text as --tokens
    dense       .npy (with --tokens) or .safetensors of logits over the whole vocabulary
    """
    settings = resolve(ImportSettings, {"format": format, "source": source}, given(options))
    from pipeline.exchange.importing import run_import

    console.result(run_import(settings, console))
