"""Strict JSON for files that may come from a stranger: bounded, no duplicate keys, no NaN, no unknown keys.

Cost: one `json.loads` of at most `max_bytes` (about 30 bytes of memory for each) and a walk over its lists.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from schemas.errors import CacheError, CorruptionError

MAX_DEPTH = 32
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(data: bytes, *, where: str, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        CorruptionError: too long, not UTF-8, not JSON, a duplicate key, NaN, a lone surrogate, nested too
            deeply, no object.
    """
    if len(data) > max_bytes:
        raise CorruptionError(f"{where}: must be at most {max_bytes} bytes of JSON, found {len(data)}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        _check_depth(value)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{where}: must be strict JSON, found {error}") from error
    if not isinstance(value, dict):
        raise CorruptionError(f"{where}: must be a JSON object, found {type(value).__name__}")
    return value


def dump_object(value: dict[str, Any]) -> bytes:
    """`value` as deterministic UTF-8 JSON: sorted keys, two spaces, a final newline."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a duplicate key")
    return result


def _check_depth(value: object) -> None:
    """Refuses what `repr` and other recursive functions could not handle; json.loads sets no limit."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        items = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = [item for inner in items for item in inner if isinstance(item, (dict, list))]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"the constant {name}")


class Fields:
    """Typed, bounded access to one JSON object; every failure names the file, the key and what was found.

    `error` is the class raised: a damaged file is corruption, a wrong option is something else.
    """

    def __init__(self, raw: object, *, where: str, error: type[CacheError] = CorruptionError) -> None:
        self.where, self._error = where, error
        if not isinstance(raw, dict):
            self.fail("an object", raw)
        self._raw: dict[str, Any] = dict(raw)
        self._seen: set[str] = set()

    def fail(self, must: str, found: object) -> NoReturn:
        """Raise: `where: must be <must>, found <found>`."""
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise self._error(f"{self.where}: must be {must}, found {shown}")

    def value(self, key: str) -> Any:
        """The raw value of a key that must exist."""
        if key not in self._raw:
            raise self._error(
                f"{self.where}: key '{key}' must be present, found only {sorted(self._raw)[:20]}"
            )
        self._seen.add(key)
        return self._raw[key]

    def has(self, key: str) -> bool:
        """Whether an optional key is there."""
        return key in self._raw

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer in [low, high]; booleans and floats are not integers."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._at(key, f"an integer from {low} to {high}", value)
        return int(value)

    def number(self, key: str, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        return self._number(key, self.value(key), low, high)

    def numbers(self, key: str, low: float, high: float, *, max_length: int) -> tuple[float, ...]:
        """A list of finite numbers in [low, high]."""
        return tuple(self._number(key, v, low, high) for v in self.items(key, max_length=max_length))

    def integers(self, key: str, low: int, high: int, *, max_length: int) -> tuple[int, ...]:
        """A list of integers in [low, high]."""
        values = self.items(key, max_length=max_length)
        for v in values:
            if isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high:
                self._at(key, f"a list of integers from {low} to {high}", v)
        return tuple(values)

    def text(self, key: str, *, max_length: int = 200, pattern: str | None = None) -> str:
        """A string; `pattern`, when given, must match all of it."""
        value = self.value(key)
        if not isinstance(value, str) or len(value) > max_length:
            self._at(key, f"a string of at most {max_length} characters", value)
        if pattern is not None and re.fullmatch(pattern, value) is None:
            self._at(key, f"a string matching {pattern}", value)
        return str(value)

    def choice(self, key: str, choices: Iterable[str]) -> str:
        """One of a few strings."""
        value, allowed = self.value(key), tuple(choices)
        if value not in allowed:
            self._at(key, f"one of {', '.join(allowed)}", value)
        return str(value)

    def items(self, key: str, *, max_length: int) -> list[Any]:
        """A list of anything, of bounded length."""
        value = self.value(key)
        if not isinstance(value, list) or len(value) > max_length:
            self._at(key, f"a list of at most {max_length} items", value)
        return list(value)

    def names(self) -> list[str]:
        """Names of an object whose keys are free."""
        return list(self._raw)

    def strings(self) -> dict[str, str]:
        """The whole object, which must map strings to strings."""
        self._seen.update(self._raw)
        for key, value in self._raw.items():
            if not isinstance(value, str):
                self._at(key, "a string", value)
        return dict(self._raw)

    def sub(self, key: str) -> "Fields":
        """A nested object."""
        return Fields(self.value(key), where=f"{self.where}: '{key}'", error=self._error)

    def corrupt(self, error: Exception) -> CacheError:
        """`error` from a constructor, as an error of this file."""
        return self._error(f"{self.where}: {error}")

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        if unknown := sorted(set(self._raw) - self._seen):
            raise self._error(
                f"{self.where}: keys must be {sorted(self._seen)}, found unknown {unknown[:10]}"
            )

    def _number(self, key: str, value: Any, low: float, high: float) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high:
            self._at(key, f"a number from {low} to {high}", value)
        return float(value)

    def _at(self, key: str, must: str, found: object) -> NoReturn:
        Fields.fail(Fields({}, where=f"{self.where}: '{key}'", error=self._error), must, found)
