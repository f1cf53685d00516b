"""`init-student`: a student made of some of the teacher's layers."""

from pathlib import Path
from typing import Any

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console
from pipeline.options import IntList


@click.command("init-student")
@click.option(
    "--teacher", "--model", "teacher", required=True, help="An mlx-lm folder, a hub id or a .gguf file."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the new student.")
@click.option("--num-layers", type=int, help="Keep so many layers, evenly spaced, first and last among them.")
@click.option("--keep-layers", type=IntList(), help="Keep these layers: 0,3,6,-1.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@console_options
def command(
    teacher: str,
    out: Path,
    num_layers: int | None,
    keep_layers: tuple[int, ...] | None,
    trust_remote_code: bool,
    console: Console,
) -> None:
    """Make a student of a teacher by keeping some of its layers (half of them if not told otherwise)."""
    from pmetal_distill.models import load_model
    from pmetal_distill.students import init_student

    loaded = load_model(teacher, trust_remote_code=trust_remote_code)
    if num_layers is None and keep_layers is None:
        num_layers = max(1, loaded.num_layers // 2)
    folder = init_student(loaded, keep_layers=keep_layers, num_layers=num_layers, out=out)
    result: dict[str, Any] = {"student": str(folder), "teacher": teacher, **_size(folder)}
    console.result(result)


def _size(folder: Path) -> dict[str, Any]:
    import json

    config = json.loads((folder / "config.json").read_text())
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"layers": config.get("num_hidden_layers"), "weights_bytes": num_bytes}
