"""Stand-ins for parts of a model: they listen to a part, answer in its place, or add to it. Cost a few dicts.

The stand-ins live in shallow copies, made anew for every call: the model itself is never changed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Path = tuple[str, ...]


class Tap:
    """Is the body in every respect, and remembers what it returned."""

    def __init__(self, body: Any) -> None:
        self._body = body
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self._body(*args, **kwargs)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class Given(Tap):
    """Is the body in every respect, but returns states that are given."""

    def __init__(self, body: Any, states: mx.array) -> None:
        super().__init__(body)
        self.output = states

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class Shaken(Tap):
    """Is a block in every respect, but each number it returns is off by up to `share` of itself."""

    def __init__(self, body: Any, share: float, seed: int) -> None:
        super().__init__(body)
        self._share, self._key = share, mx.random.key(seed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._body(*args, **kwargs)
        states = states_of(output)
        shares = mx.random.uniform(-self._share, self._share, states.shape, key=self._key)
        shaken = (states.astype(mx.float32) * (1 + shares)).astype(states.dtype)
        return (shaken, *output[1:]) if isinstance(output, tuple) else shaken


def states_of(output: Any) -> mx.array:
    """A block may return more than its states; they come first."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, mx.array):
        raise TypeError(f"expected hidden states, found {type(first).__name__}")
    return first


def replaced(module: nn.Module, path: Path, value: Any) -> nn.Module:
    """A copy of `module` that shares everything with it but the entry at `path`."""
    copy: nn.Module = type(module).__new__(type(module))
    dict.update(copy, module)
    copy.__dict__.update(module.__dict__)
    key, *rest = path
    dict.__setitem__(copy, key, replaced(module[key], tuple(rest), value) if rest else value)
    return copy


def at(module: nn.Module, path: Path) -> Any:
    """The entry at `path`."""
    found: Any = module
    for key in path:
        found = found[key]
    return found


def path_to_blocks(model: nn.Module) -> Path | None:
    """Path to the list that holds `model.layers`."""
    wanted = list(model.layers)
    for path, value in lists_of(model):
        if len(value) == len(wanted) and all(a is b for a, b in zip(value, wanted, strict=True)):
            return path
    return None


def with_blocks(model: nn.Module, blocks: Sequence[Any]) -> nn.Module | None:
    """A copy of `model` with these blocks instead of its own; None if its list of blocks is not found."""
    path = path_to_blocks(model)
    return None if path is None else replaced(model, path, list(blocks))


def lists_of(module: nn.Module, prefix: Path = ()) -> Iterator[tuple[Path, list[Any]]]:
    """Every list of modules, with its path, but those inside of another."""
    for key, value in module.items():
        if isinstance(value, list) and value and isinstance(value[0], nn.Module):
            yield (*prefix, key), value
        elif isinstance(value, nn.Module):
            yield from lists_of(value, (*prefix, key))
