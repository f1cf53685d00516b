"""`plan`: cost and error of a cache before it is made."""

from pathlib import Path
from typing import Any

import click

from pipeline.commands.shared import FloatList, console_options
from pipeline.config import load_config, resolve
from pipeline.console import Console
from pipeline.options import IntList, given, settings_options
from pipeline.settings import CacheSettings
from schemas.errors import PmetalError

GRID = ("tail", "top_k", "sketch_rank", "sketch_step")
UNUSED = ("out", "resume", "sharded")


class TailList(click.ParamType[Any]):
    """Comma-separated kinds of tail."""

    name = "tail,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        tails = tuple(part.strip() for part in value.split(",") if part.strip())
        if not tails or set(tails) - {"sketch", "bucket", "none"}:
            self.fail(f"{value!r} is not a list of sketch, bucket, none", param, ctx)
        return tails


@click.command("plan")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="YAML file of `cache` to start from.")
@click.option("--tail", type=TailList(), default="sketch,bucket", show_default=True, help="Kinds to try.")
@click.option("--top-k", type=IntList(), default="16", show_default=True, help="Head sizes to try.")
@click.option("--sketch-rank", type=IntList(), default="128,256,384", show_default=True, help="Ranks to try.")
@click.option("--sketch-step", type=FloatList(), default="45,60,80", show_default=True, help="Steps to try.")
@click.option("--target-error", type=float, help="Pick the cheapest setting with at most this error.")
@click.option("--temperature", type=float, default=2.0, show_default=True, help="Where it counts.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("cache"), help="For the printed command."
)
@settings_options(CacheSettings, positional=(*GRID, *UNUSED))
@console_options
def command(
    config: Path | None,
    tail: tuple[Any, ...],
    top_k: tuple[int, ...],
    sketch_rank: tuple[int, ...],
    sketch_step: tuple[float, ...],
    target_error: float | None,
    temperature: float,
    out: Path,
    console: Console,
    **options: Any,
) -> None:
    """Try settings of `cache` on a sample: bytes, disk, time, memory and the error at each temperature.

    With --target-error E --temperature T: also the `cache` command of the cheapest one with that error. Exit
    code 1 when none reaches it.
    """
    from pipeline.planning import Grid, Target, plan_text, run_plan

    values = load_config(config, CacheSettings) if config else {}
    smallest = {"sketch_rank": 1}  # the grid's ranks are checked one by one
    base = resolve(CacheSettings, values | smallest, given(options) | {"out": out})
    target = None if target_error is None else Target(target_error, temperature)
    plan = run_plan(base, Grid(tail, top_k, sketch_rank, sketch_step), console, target=target)
    console.result(plan, plan_text(plan, target))
    if target is not None and plan["command"] is None:
        raise PmetalError(
            f"--target-error: must be within reach, found {plan['best']:.4g} at best at T = {temperature:g}; "
            "try larger ranks, smaller steps or more calibration tokens"
        )
