"""`demo`: everything, on a real model, without a network."""

from pathlib import Path

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for everything that it makes.",
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier demo left in the folder.")
@click.option("--num-layers", default=10, show_default=True, help="Layers of the student.")
@click.option("--iters", default=36, show_default=True, help="Training steps.")
@console_options
def command(out: Path, overwrite: bool, num_layers: int, iters: int, console: Console) -> None:
    """Distil SmolLM2-135M-Instruct into a third of its layers and measure how close it got."""
    from pipeline.demo import DemoOptions, report, run_demo

    options = DemoOptions(out=out, num_layers=num_layers, iters=iters)
    result = run_demo(options, console, overwrite=overwrite)
    console.result(result, report(result))
