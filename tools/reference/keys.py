"""Keys of configuration files, out of the settings' dataclasses."""

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config_schema import describe_type
from pipeline.settings import CacheSettings, LoraParameters, LrSchedule, TrainSettings
from pmetal_distill.config import DistillConfig
from pmetal_distill.losses import TaidSchedule
from pmetal_distill.schedule import Schedule, TemperatureSchedule
from tools.reference.commands import shown
from tools.reference.markdown import attributes, code, plain, table

FILES: dict[str, type] = {"cache": CacheSettings, "train": TrainSettings}
NESTED: dict[str, type] = {
    "lora_parameters": LoraParameters,
    "lr_schedule": LrSchedule,
    "temperature and alpha": TemperatureSchedule,
}


class Key(NamedTuple):
    """A key of a file."""

    names: tuple[str, ...]
    kind: str
    default: str
    meaning: str


def keys(settings: type) -> Iterator[Key]:
    """The keys of a settings class; meanings from its fields, else from its docstring."""
    hints = typing.get_type_hints(settings)
    described = attributes(inspect.getdoc(settings) if settings.__doc__ else "")
    if issubclass(settings, Schedule):
        described = attributes(inspect.getdoc(Schedule))
    for field in dataclasses.fields(settings):
        data: Mapping[str, Any] = field.metadata
        meaning = data.get("help") or data.get("meaning") or described.get(field.name, "")
        names = (field.name, *data.get("aliases", ()))
        yield Key(names, _kind(hints[field.name]), _default(field), _sentence(plain(meaning)))


def _sentence(text: str) -> str:
    return text if text.startswith("e.g.") else text[:1].upper() + text[1:]


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_kind(arm) for arm in typing.get_args(hint) if arm is not types.NoneType)
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(f"'{member.value}'" for member in hint)
    if typing.get_origin(hint) is Sequence:
        return f"a list (each item {describe_type(typing.get_args(hint)[0])})"
    text = describe_type(hint)
    return "a mapping, see below" if text.startswith("a mapping with ") else text


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else ""
    if isinstance(field.default, bool):
        return "true" if field.default else "false"
    return shown(field.default)


def key_table(settings: type) -> str:
    """The table of a settings class."""
    rows = [
        [", ".join(map(code, key.names)), key.kind, code(key.default) if key.default else "", key.meaning]
        for key in keys(settings)
    ]
    return table(["key", "value", "default", "meaning"], rows)


def foreign_table(settings: type) -> str:
    """Keys of mlx_lm that are refused, with the advice."""
    refused: Mapping[str, str] = getattr(settings, "foreign_keys", {})
    return table(["key", "what to do instead"], [[code(k), plain(text)] for k, text in refused.items()])


def all_sections() -> str:
    """Both files, what is nested in them, and the library's own."""
    parts = []
    for name, settings in FILES.items():
        parts += [f"### {name}.yaml", f"`pmetal-pipeline {name} -c FILE`", key_table(settings)]
        parts += [f"Keys of `mlx_lm.lora` that `{name}` refuses:", foreign_table(settings)]
        if unused := getattr(settings, "left_out_keys", {}):
            rows = [[code(key), plain(why)] for key, why in unused.items()]
            parts += [
                f"Keys of `mlx_lm.lora` that `{name}` leaves out and names:",
                table(["key", "why"], rows),
            ]
    for name, settings in NESTED.items():
        parts += [f"### {name} (train.yaml)", key_table(settings)]
    parts += [
        "### DistillConfig.from_yaml",
        "The settings of the library's `Distiller`.",
        key_table(DistillConfig),
    ]
    parts += ["### taid (DistillConfig)", key_table(TaidSchedule)]
    return "\n\n".join(parts)
