"""Commands, arguments and options, out of click's own objects."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from pipeline.cli import COMMANDS, group
from pipeline.exchange.settings import ImportSettings
from pipeline.settings import CacheSettings, TrainSettings
from tools.reference.markdown import code, plain, table

SETTINGS: dict[str, type] = {
    "cache": CacheSettings,
    "plan": CacheSettings,
    "train": TrainSettings,
    "import": ImportSettings,
}
_NAMES = ("--help", "--json", "--quiet")


class Option(NamedTuple):
    """An option as the reference shows it. `default` is empty where there is none."""

    command: str
    flags: tuple[str, ...]
    kind: str
    default: str
    help: str


def command(name: str) -> click.Command:
    """A command by its name."""
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


def options(name: str) -> Iterator[Option]:
    """Every option of a command but --help."""
    context = click.Context(command(name), info_name=name)
    for option in command(name).params:
        if isinstance(option, click.Option):
            flags = (*option.opts, *option.secondary_opts)
            yield Option(name, flags, _kind(option, context), _default(name, option, context), _help(option))


def _kind(option: click.Option, context: click.Context) -> str:
    if option.is_flag and option.is_bool_flag:
        return "flag"
    text = option.make_metavar(context)
    return text if text.startswith("[") else text.lower()


def _default(name: str, option: click.Option, context: click.Context) -> str:
    if option.required:
        return "required"
    value = option.get_default(context)
    known = isinstance(value, bool | int | float | str | Path)
    fields = {f.name: f for f in dataclasses.fields(SETTINGS[name])} if name in SETTINGS else {}
    if not known and option.name in fields:
        value = fields[option.name].default
        if value is dataclasses.MISSING:
            return "required"
    if isinstance(value, bool):
        return "on" if value else ""
    return shown(value)


def shown(value: Any) -> str:
    """A default value; empty for none."""
    if not isinstance(value, int | float | str | Path):
        return ""
    return f"{value:g}" if isinstance(value, float) and (value == 0 or abs(value) >= 1e-4) else str(value)


def _help(option: click.Option) -> str:
    return plain(re.sub(r"\s*\[default: [^]]*\]", "", option.help or ""))


def synopsis(name: str) -> str:
    """The command line."""
    found = command(name)
    pieces = found.collect_usage_pieces(click.Context(found, info_name=name))
    return " ".join(
        ["pmetal-pipeline", name, *(piece for piece in pieces if piece != "[OPTIONS]"), "[OPTIONS]"]
    )


def description(name: str) -> str:
    """What a command's help says, as Markdown."""
    text = inspect.cleandoc(command(name).help or "")
    blocks = [block.strip("\n") for block in text.split("\n\n")]
    return "\n\n".join(
        "```\n" + block.removeprefix("\b\n") + "\n```" if block.startswith("\b") else block
        for block in blocks
    )


def section(name: str) -> str:
    """Everything about a command."""
    rows = [
        [", ".join(map(code, o.flags)), code(o.kind), code(o.default) if o.default else "", o.help]
        for o in options(name)
        if not set(_NAMES) & set(o.flags)
    ]
    parts = [f"### {name}", f"```\n{synopsis(name)}\n```", description(name)]
    if rows:
        parts.append(table(["option", "value", "default", "meaning"], rows))
    return "\n\n".join(parts)


def shared() -> str:
    """The options that every command has."""
    rows = [[", ".join(map(code, o.flags)), o.help] for o in options("cache") if set(_NAMES) & set(o.flags)]
    rows.append(["`-h`, `--help`", "Show the options and exit."])
    rows += [
        [", ".join(map(code, o.opts)), f"Before any command: {plain(o.help or '')}"]
        for o in group.params
        if isinstance(o, click.Option)
    ]
    return table(["option", "meaning"], rows)


def all_sections() -> str:
    """Of all commands, in the order of the help."""
    return "\n\n".join(section(name) for name in COMMANDS)
