"""`export`: a cache as plain lists, or as log-probabilities over the whole vocabulary."""

from pathlib import Path

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console
from pipeline.options import PLACE
from schemas.errors import UsageError


@click.command("export")
@click.argument("cache", type=PLACE)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the export.")
@click.option(
    "--dense",
    type=click.Choice(["safetensors", "npy"]),
    is_flag=False,
    flag_value="safetensors",
    help="Rows over the whole vocabulary instead, a file a sequence; alone it means safetensors.",
)
@click.option("--sequences", help="With --dense: which, as 0:4 or 0,3,9.")
@console_options
def command(cache: str, out: Path, dense: str | None, sequences: str | None, console: Console) -> None:
    """Write CACHE, a folder or URL, as Parquet of plain lists: `datasets`, DuckDB and pandas read it.

    With --dense --sequences 0:4: log-probabilities at T=1 of every token of the vocabulary.
    """
    if (dense is None) != (sequences is None):
        raise UsageError("export: --dense must come with --sequences, such as 0:4; give both or neither")
    if dense is None or sequences is None:
        from pipeline.exchange.exporting import export_lists

        console.result(export_lists(cache, out, console))
        return
    from pipeline.exchange.export_dense import DenseFormat, export_dense

    file_format: DenseFormat = "npy" if dense == "npy" else "safetensors"
    console.result(export_dense(cache, out, console, sequences=sequences, file_format=file_format))
