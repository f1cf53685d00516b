"""Strict YAML configuration files for settings dataclasses. Imports nothing heavy.

    values   = load_config(Path("run.yaml"), TrainSettings)     # only the keys that the file gives, checked
    settings = resolve(TrainSettings, values, typed_options)    # command line beats file beats defaults
    save_config(settings, Path("run/config.yaml"))              # reads back as it was

The dataclass is the schema: field types are enforced, nested dataclasses are nested mappings. A field's
`metadata["aliases"]` are other names of its key; the class attribute `foreign_keys` maps keys of other tools
to what to do instead. YAML is read as PyYAML reads it, except that `1e-5` is a number and a key given
twice an error.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.config_schema import Keys, check_keys, missing_fields
from schemas.errors import UsageError

T = TypeVar("T")

# YAML 1.2 floats that PyYAML (YAML 1.1) takes for strings: an exponent without a point or without a sign.
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_FLOAT_TAG = "tag:yaml.org,2002:float"
_MERGE_TAG = "tag:yaml.org,2002:merge"

Lines = dict[Keys, int]


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


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
    values, lines = _parse(_read_text(path), path)

    def where(keys: Keys) -> str:
        line = next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), 1)
        return f"{path}:{line}: '{'.'.join(keys)}'"

    return check_keys(values, cls, where)


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
    text = yaml.dump(to_plain(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"{path}: must be a readable file, found: {error.strerror}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: must be UTF-8, found: {error.reason}; convert the file") from error


def _parse(text: str, path: Path) -> tuple[dict[str, Any], Lines]:
    try:
        return _construct(text, path)
    except UsageError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: must be YAML, found: {error.problem}; correct the line") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: must be YAML, found: {error}; correct the file") from error


def _construct(text: str, path: Path) -> tuple[dict[str, Any], Lines]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}, {}
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{path}: must be a mapping, found something else; write 'key: value' lines")
        lines: Lines = {}
        _index(root, (), lines, {}, path)
        return {str(key): value for key, value in loader.construct_document(root).items()}, lines
    finally:
        loader.dispose()


def _index(node: yaml.Node, keys: Keys, lines: Lines, done: dict[int, bool], path: Path) -> None:
    """Notes the line of every key; refuses a key given twice and an alias inside its own anchor."""
    if id(node) in done:
        if not done[id(node)]:
            raise UsageError(f"{path}: '{'.'.join(keys)}' must not contain itself, found an alias that does")
        return
    done[id(node)] = False
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[(*keys, str(number))] = item.start_mark.line + 1
            _index(item, (*keys, str(number)), lines, done, path)
    elif isinstance(node, yaml.MappingNode):
        _index_mapping(node, keys, lines, done, path)
    done[id(node)] = True


def _index_mapping(
    node: yaml.MappingNode, keys: Keys, lines: Lines, done: dict[int, bool], path: Path
) -> None:
    here: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in here and key_node.tag != _MERGE_TAG:
            name = ".".join((*keys, key))
            raise UsageError(
                f"{path}:{line}: '{name}' must stand once, found it in line {here[key]} too; keep one"
            )
        here[key] = lines[(*keys, key)] = line
        _index(value_node, (*keys, key), lines, done, path)
