"""Command-line options made from a settings dataclass, so that names, defaults and help stand in one place.

A field's `metadata["help"]` is the option's help text; its type gives the option's type. An option that is
not typed is absent from the result: the command line beats the configuration file, the file the defaults.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


class IntList(click.ParamType[Any]):
    """Comma-separated integers, e.g. 6,12,-1; `all_too`: or the word all."""

    name = "int,int,..."

    def __init__(self, *, all_too: bool = False) -> None:
        self._all = all_too

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value == "all" and self._all:
            return value
        try:
            return tuple(int(part) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 6,12,-1", param, ctx)


class Place(click.ParamType[Any]):
    """A path, a hub id or a URL: text that shells complete as a path."""

    name = "text"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


PLACE = Place()


def settings_options(settings: type, *, positional: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Adds an option for every field with a help text; `positional` fields are left to the caller."""

    def decorate(function: F) -> F:
        hints = typing.get_type_hints(settings)
        for field in reversed(dataclasses.fields(settings)):
            if "help" in field.metadata and field.name not in positional:
                function = _option(field, hints[field.name])(function)
        return function

    return decorate


def _option(field: "dataclasses.Field[Any]", hint: Any) -> Callable[[F], F]:
    flag = "--" + field.name.replace("_", "-")
    help_text = field.metadata["help"] + _default_text(field)
    base = _strip_optional(hint)
    if base is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=help_text)
    aliases = ["--" + alias.replace("_", "-") for alias in field.metadata.get("aliases", ())]
    kind = IntList(all_too=True) if _takes_all(hint) else _click_type(base)
    kind = PLACE if field.metadata.get("place") else kind
    return click.option(flag, *aliases, field.name, type=kind, default=None, help=help_text)


def _takes_all(hint: Any) -> bool:
    """Whether a list may also be the word all."""
    return any(typing.get_args(arm) == ("all",) for arm in typing.get_args(hint))


def _strip_optional(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        scalars = [arg for arg in inner if arg in (int, float, str)]
        return scalars[0] if scalars else inner[0]
    return hint


def _click_type(base: Any) -> Any:
    origin = typing.get_origin(base)
    if origin is Literal:
        return click.Choice([str(choice) for choice in typing.get_args(base)])
    if origin is tuple:
        return IntList()
    return {int: int, float: float, str: str, Path: click.Path(path_type=Path)}.get(base, str)


def _default_text(field: "dataclasses.Field[Any]") -> str:
    default = field.default
    if default is dataclasses.MISSING or default is None or default in ("", ()) or isinstance(default, bool):
        return ""
    return f"  [default: {default}]"


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were typed."""
    return {name: value for name, value in options.items() if value is not None}
