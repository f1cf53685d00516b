"""Strict YAML files: a key given twice is an error with its line, `1e-5` is a number. Cheap to import.

Files are bounded, also in what aliases make of them: a recipe from a stranger must not fill the memory.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from pmetal_distill.plain_files import open_regular
from schemas.errors import UsageError

Keys = tuple[str, ...]
Lines = dict[Keys, int]

# YAML 1.2 floats that PyYAML (YAML 1.1) takes for strings: an exponent without a point or without a sign.
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_FLOAT_TAG = "tag:yaml.org,2002:float"
_MERGE_TAG = "tag:yaml.org,2002:merge"
_INT_TAG = "tag:yaml.org,2002:int"

# PyYAML writes these as they are and reads them back as the end of a line.
_LINE_BREAKS = {"\x85", "\u2028", "\u2029"}
MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_INTEGER_CHARACTERS = 40


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """PyYAML fails in many ways on values that are not of the type that their tag names."""
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the tag {event.tag!r}", event.start_mark)
        return super().compose_node(parent, index)

    def construct_short_int(self, node: yaml.ScalarNode) -> int:
        """Numbers of base 60 take quadratic time, and Python does not print integers of 4300 digits."""
        if len(node.value) > MAX_INTEGER_CHARACTERS:
            problem = f"an integer of {len(node.value)} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(self.construct_yaml_int(node))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_constructor(_INT_TAG, _Loader.construct_short_int)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


def write_yaml(value: Any, path: Path) -> None:
    """Writes plain values so that `read_yaml` reads them back; the file appears whole or not at all."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if _LINE_BREAKS & set(text):
        text = yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"{path}: must be a readable file, found: {error.strerror}; check the path"
        ) from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: must have at most {MAX_BYTES} bytes, found more; give a smaller file")
    try:
        return data.decode("utf-8-sig")
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
        if _index(root, (), lines, {}, path) > MAX_NODES:
            raise UsageError(f"{path}: must hold at most {MAX_NODES} values with its aliases, found more")
        values = loader.construct_document(root)
        return {str(key): value for key, value in values.items()}, lines
    finally:
        loader.dispose()


def _index(node: yaml.Node, keys: Keys, lines: Lines, sizes: dict[int, int], path: Path) -> int:
    """Notes the line of every key; the number of values below, aliases spelled out.

    Refuses a key given twice, a key that is no plain value, and an alias inside its own anchor.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise UsageError(f"{path}: '{'.'.join(keys)}' must not contain itself, found an alias that does")
        return sizes[id(node)]
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[(*keys, str(number))] = item.start_mark.line + 1
            size += _index(item, (*keys, str(number)), lines, sizes, path)
    elif isinstance(node, yaml.MappingNode):
        size += _index_mapping(node, keys, lines, sizes, path)
    sizes[id(node)] = size
    return size


def _index_mapping(
    node: yaml.MappingNode, keys: Keys, lines: Lines, sizes: dict[int, int], path: Path
) -> int:
    here: dict[str, int] = {}
    size = 0
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UsageError(f"{path}:{line}: must be YAML with plain keys, found a list or mapping")
        key = str(key_node.value)
        if key in here and key_node.tag != _MERGE_TAG:
            name = ".".join((*keys, key))
            raise UsageError(
                f"{path}:{line}: '{name}' must stand once, found it in line {here[key]} too; keep one"
            )
        here[key] = lines[(*keys, key)] = line
        size += _index(value_node, (*keys, key), lines, sizes, path)
    return size
