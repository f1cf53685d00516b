"""Checks plain values against a settings dataclass and converts them. Imports nothing heavy.

Handles the types that settings use: bool, int, float, str, Path, None, Literal, unions, `tuple[T, ...]`,
`Mapping[str, T]`, Any and nested dataclasses. Lists become tuples, mappings dataclasses, whole numbers floats
where a float is wanted; nothing else is converted: `"3"` is no number and `1` no truth value.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from schemas.errors import UsageError

Keys = tuple[str, ...]
Where = Callable[[Keys], str]  # names a key, e.g. ("lr_schedule", "warmup"), and its place, for messages

SUGGESTION_CUTOFF = 0.6
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
    types.NoneType: "null",
    Any: "anything",
}


class Key(NamedTuple):
    """A field that a key sets, with its type."""

    name: str
    hint: Any


def key_names(cls: type[Any]) -> dict[str, Key]:
    """Every key that a settings class takes: its fields and their aliases."""
    hints = typing.get_type_hints(cls)
    return {
        name: Key(field.name, hints[field.name])
        for field in dataclasses.fields(cls)
        for name in (field.name, *field.metadata.get("aliases", ()))
    }


def check_keys(
    values: Mapping[Any, Any], cls: type[Any], where: Where, *, parents: Keys = ()
) -> dict[str, Any]:
    """Maps the keys of `values` to fields of `cls` and converts the values.

    Args:
        values: key or alias to plain value.
        cls: the settings dataclass.
        where: names a key and its place.
        parents: the keys above this mapping.

    Raises:
        UsageError: an unknown key, a key beside its alias, a value of the wrong type.
    """
    names = key_names(cls)
    result: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for key, value in values.items():
        keys = (*parents, str(key))
        if key not in names:
            raise UsageError(f"{where(keys)}: {_unknown(str(key), cls, names)}")
        name, hint = names[key]
        if name in result:
            raise UsageError(
                f"{where(keys)}: means the same as '{given_as[name]}', found both; keep one of them"
            )
        given_as[name] = key
        result[name] = convert(value, hint, where, keys=keys)
    return result


def missing_fields(cls: type[Any], values: Mapping[str, Any]) -> list[str]:
    """The fields without a default that `values` lacks."""
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in values
    ]


def convert(value: Any, hint: Any, where: Where, *, keys: Keys) -> Any:
    """`value` as the type `hint`.

    Raises:
        UsageError: it is not of that type; names the key, what was expected and what was found.
    """
    fitting = next((arm for arm in _arms(hint) if _fits(value, arm)), None)
    if fitting is None:
        raise UsageError(
            f"{where(keys)}: must be {describe_type(hint)}, found {_describe(value)}; correct the value"
        )
    origin, arguments = typing.get_origin(fitting), typing.get_args(fitting)
    if dataclasses.is_dataclass(fitting):
        return _make(value, typing.cast(type[Any], fitting), where, keys)
    if origin is tuple:
        return tuple(
            convert(item, arguments[0], where, keys=(*keys, str(number))) for number, item in enumerate(value)
        )
    if fitting is dict or origin in (dict, Mapping):
        item_hint = arguments[1] if arguments else Any
        return {key: convert(item, item_hint, where, keys=(*keys, str(key))) for key, item in value.items()}
    return fitting(value) if fitting in (float, Path) else value


def describe_type(hint: Any) -> str:
    """A type in words, for messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(arm) for arm in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(f"'{choice}'" for choice in arguments)
    if origin is tuple:
        return f"a list (each item {describe_type(arguments[0])})"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(hint))}"
    return _WORDS.get(hint, "a mapping")


def _arms(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether the value has the outer shape of the type; what is inside is checked on conversion."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, list | tuple)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping | typing.cast(type[Any], hint))
    if hint is dict or origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    accepted: dict[Any, tuple[type[Any], ...]] = {float: (int, float), Path: (str, Path)}
    return isinstance(value, accepted.get(hint, (hint,))) and (hint is bool or not isinstance(value, bool))


def _make(value: Any, cls: type[Any], where: Where, keys: Keys) -> Any:
    if isinstance(value, cls):
        return value
    values = check_keys(value, cls, where, parents=keys)
    missing = missing_fields(cls, values)
    if missing:
        raise UsageError(f"{where(keys)}: must have the key '{missing[0]}', found none; add it")
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{where(keys)}: {error}") from error


def _unknown(key: str, cls: type[Any], names: Mapping[str, Key]) -> str:
    foreign: Mapping[str, str] = getattr(cls, "foreign_keys", {})
    if key in foreign:
        return f"is no key here; {foreign[key]}"
    close = difflib.get_close_matches(key.replace("-", "_").lower(), names, n=1, cutoff=SUGGESTION_CUTOFF)
    if close:
        return f"is no key here; did you mean '{close[0]}'?"
    return f"is no key here; the keys are {', '.join(names)}"


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"the string '{value}'" if isinstance(value, str) else str(value)
