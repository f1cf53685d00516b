"""`init-student`: a student out of the teacher's parts, or a fresh one."""

from pathlib import Path
from typing import Any

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console
from pipeline.new_student import NewStudent, make_student
from pipeline.options import PLACE, IntList


@click.command("init-student")
@click.option(
    "--teacher",
    "--model",
    "teacher",
    type=PLACE,
    required=True,
    help="An mlx-lm folder, a hub id or a .gguf file.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the new student.")
@click.option("--num-layers", type=int, help="Keep so many layers.")
@click.option(
    "--by",
    type=click.Choice(["evenly", "importance"]),
    default="evenly",
    show_default=True,
    help="Which ones: evenly spaced, or those that change the states most, measured on --data.",
)
@click.option("--layers", "--keep-layers", "keep_layers", type=IntList(), help="Keep these layers: 0,3,6,-1.")
@click.option(
    "--mlp-width",
    type=float,
    help="Keep so many neurons in each MLP, or this share of them (0.5): the most active on --data.",
)
@click.option(
    "--data", type=PLACE, help="Text to measure layers and neurons on, in any form that `cache` takes."
)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="train",
    show_default=True,
    help="Which part of --data that has several.",
)
@click.option(
    "--from-config",
    type=click.Path(path_type=Path),
    help="A config.json: a fresh student of this shape, with the teacher's embeddings if it is as wide.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of a fresh student's weights.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@console_options
def command(console: Console, **options: Any) -> None:
    """Make a student of a teacher by leaving out layers, neurons or both, or a fresh one beside it.

    It keeps half of the layers, evenly spaced, if not told otherwise. Layers chosen by importance make a far
    better student than evenly spaced ones. A pretrained model of the teacher's family needs no init-student:
    give it to `train` as it is.
    """
    console.result(make_student(NewStudent(**options), console))
