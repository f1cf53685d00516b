"""Strict YAML configuration files for settings dataclasses. Imports nothing heavy.

    values   = load_config(Path("run.yaml"), TrainSettings)     # only the keys that the file gives, checked
    settings = resolve(TrainSettings, values, typed_options)    # command line beats file beats defaults
    save_config(settings, Path("run/config.yaml"))              # reads back as it was

The dataclass is the schema: field types are enforced, nested dataclasses are nested mappings. A field's
`metadata["aliases"]` are other names of its key; the class attribute `foreign_keys` maps keys of other tools
to what to do instead, and `left_out_keys` those that may stand in a file to the reason why they do nothing.
YAML is read as PyYAML reads it, except that `1e-5` is a number and a key given twice an error.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config_schema import Keys, check_keys, missing_fields
from pmetal_distill.yaml_files import read_yaml, write_yaml
from schemas.errors import UsageError

T = TypeVar("T")


def load_config(path: Path, cls: type[Any]) -> dict[str, Any]:
    """Reads a configuration file.

    Args:
        path: a YAML file with one mapping; an empty file gives no key.
        cls: the settings dataclass.

    Returns:
        field name to checked value, of the keys that the file has.

    Raises:
        UsageError: unreadable, not YAML, an unknown or duplicate key, a wrong type; with the line.
    """
    return read_config(path, cls)[0]


def read_config(path: Path, cls: type[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What `load_config` returns, and the keys that were left out with the reason.

    Args, Raises: as for `load_config`.
    """
    values, lines = read_yaml(path)
    unused: Mapping[str, str] = getattr(cls, "left_out_keys", {})
    left_out = {key: unused[key] for key in values if key in unused}
    values = {key: value for key, value in values.items() if key not in left_out}

    def where(keys: Keys) -> str:
        line = next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), 1)
        return f"{path}:{line}: '{'.'.join(keys)}'"

    return check_keys(values, cls, where), left_out


def resolve(cls: type[T], file_values: Mapping[str, Any], cli_values: Mapping[str, Any]) -> T:
    """Makes the settings: command line beats file beats defaults.

    Args:
        cls: the settings dataclass.
        file_values: what `load_config` returned, or empty.
        cli_values: field name to value; None stands for an option that was not typed.

    Raises:
        UsageError: a required setting is missing, an option has the wrong type, or `cls` refuses the values.
    """
    typed = {name: value for name, value in cli_values.items() if value is not None}
    options = check_keys(typed, cls, _option)
    merged = {**file_values, **options}
    for name in missing_fields(cls, merged):
        raise UsageError(
            f"{name}: must be given, found nothing; add {_option((name,))} or the key '{name}' of a "
            "configuration file"
        )
    return cls(**merged)


def save_config(settings: Any, path: Path) -> None:
    """Writes every setting as YAML that `load_config` reads back; the file appears whole or not at all."""
    write_yaml(to_plain(settings), path)


def to_plain(value: Any) -> Any:
    """Dataclasses to mappings, tuples to lists, paths to strings: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _option(keys: Keys) -> str:
    return "--" + keys[0].replace("_", "-")
