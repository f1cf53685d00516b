"""Strict YAML files: a key given twice is an error with its line, `1e-5` is a number. Cheap to import."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from schemas.errors import UsageError

Keys = tuple[str, ...]
Lines = dict[Keys, int]

# YAML 1.2 floats that PyYAML (YAML 1.1) takes for strings: an exponent without a point or without a sign.
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_FLOAT_TAG = "tag:yaml.org,2002:float"
_MERGE_TAG = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


def write_yaml(value: Any, path: Path) -> None:
    """Writes plain values so that `read_yaml` reads them back; the file appears whole or not at all."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"{path}: must be a readable file, found: {error.strerror}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: must be UTF-8, found: {error.reason}; convert the file") from error


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in a file, and the line of each of its keys.

    Raises:
        UsageError: unreadable, not YAML, not a mapping, or a key given twice; with the line.
    """
    text = _read_text(path)
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
