"""Options that every command has."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from pipeline.console import Console

F = TypeVar("F", bound=Callable[..., Any])


def console_options(function: F) -> F:
    """Adds --json and --quiet; the command gets `console`."""

    def with_console(*args: Any, as_json: bool, quiet: bool, **options: Any) -> Any:
        return function(*args, console=Console(as_json=as_json, quiet=quiet), **options)

    with_console.__name__, with_console.__doc__ = function.__name__, function.__doc__
    if hasattr(function, "__click_params__"):
        with_console.__click_params__ = function.__click_params__  # type: ignore[attr-defined]
    quiet_option = click.option("--quiet", "-q", is_flag=True, help="Say nothing on stderr but errors.")
    json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    return json_option(quiet_option(with_console))  # type: ignore[return-value]


def dtype_option(who: str) -> Callable[[F], F]:
    """Adds --dtype, the type that models compute in."""
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help=f"Type that {who} in; auto: float32 on a CPU, else a model's own if that is half precision, "
        "else bfloat16.",
    )


class FloatList(click.ParamType[Any]):
    """Comma-separated numbers, e.g. 1,2,4."""

    name = "number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(float(part) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,2,4", param, ctx)
