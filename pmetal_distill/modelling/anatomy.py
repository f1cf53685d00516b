"""Takes an mlx-lm model apart into body and head without knowing its class. Costs some passes of 8 tokens.

mlx-lm's language models have the form `out = self.model(inputs, cache); return head(out)`. Here the module
that holds the blocks is found by looking for the blocks; the body is run by calling the model with that
module under a tap (the head that follows is never evaluated, MLX being lazy); the head is run by calling
the model with that module replaced by one that returns given states. So soft-caps, scales and all else that
a class does come along. Every claim is checked against the model's plain call, and what fails is left out
with a note.

The stand-ins live in shallow copies, made anew for every call: the model itself is never changed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from pmetal_distill.modelling.documents import document_caches
from pmetal_distill.modelling.heads import LinearHead, find_linear_head

Path = tuple[str, ...]
Packing = Literal["batch", "rows", "none"]

_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_KV_CACHES = ("KVCache", "RotatingKVCache")
_FIRST, _SECOND, _OTHER = (1, 2, 3), (4, 5, 6, 7, 8), (9, 10, 11)
# Largest relative differences in float32 and in half precision: of the same products in other shapes, and of
# attention through a mask instead of the causal kernel. A wrong mask changes rows by about their own size.
_ROUNDING = (1e-4, 2e-2)
_PACKED = (1e-3, 1e-1)

_NO_SPLIT = "the head cannot be split off: the model's full call is used, and hidden states are not available"
_NO_MATRIX = (
    "the head is not a matrix that could be found: the model's own head is called on chunks of tokens"
)
_NO_BLOCKS = "the outputs of the blocks cannot be had: hidden-state losses are not available"
_NO_PACKING = "several documents in one sequence cannot be kept apart: use one document per sequence"


@dataclass(frozen=True, slots=True)
class CacheKind:
    """One entry of the model's own cache list: the class's name, and its window if it has one."""

    name: str
    max_size: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """What was found and verified.

    Attributes:
        body: path from the model to the module that gives the final hidden states; None if the model cannot
            be split, so that only its full call is left.
        blocks: path from the body to the list of blocks; None if their outputs cannot be had.
        head: the head as a matrix, or None.
        packing: how several documents in a sequence are kept apart: one mask for the batch, one sequence at a
            time, or not at all.
        windows: per cache of the model, its window.
        num_layers, hidden_size, vocab_size: sizes; `hidden_size` is 0 if the model cannot be split.
        notes: what the user should know.
    """

    body: Path | None
    blocks: Path | None
    head: LinearHead | None
    packing: Packing
    windows: tuple[int | None, ...]
    num_layers: int
    hidden_size: int
    vocab_size: int
    notes: tuple[str, ...]


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


def run_body(
    model: nn.Module,
    body: Path,
    blocks: Path | None,
    token_ids: mx.array,
    caches: list[Any] | None,
    layers: Sequence[int],
) -> tuple[mx.array, dict[int, mx.array]]:
    """Final hidden states, and the outputs of the blocks in `layers`."""
    module, taps = at(model, body), {}
    if layers and blocks is not None:
        stack = list(at(module, blocks))
        taps = {index: Tap(stack[index]) for index in layers}
        module = replaced(module, blocks, [taps.get(index, block) for index, block in enumerate(stack)])
    tap = Tap(module)
    owner = at(model, body[:-1])
    replaced(owner, body[-1:], tap)(token_ids, cache=caches)
    return _array(tap.output), {index: _array(block.output) for index, block in taps.items()}


def run_head(model: nn.Module, body: Path, hidden: mx.array) -> mx.array:
    """Hidden states [..., d] -> logits [..., V], by the model's own head."""
    states = hidden.reshape(1, -1, hidden.shape[-1])
    owner = at(model, body[:-1])
    stand_in = Given(at(model, body), states)
    logits = _array(replaced(owner, body[-1:], stand_in)(mx.zeros(states.shape[:2], mx.int32), cache=None))
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def _array(output: Any) -> mx.array:
    """A block may return more than its states; they come first."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, mx.array):
        raise TypeError(f"expected hidden states, found {type(first).__name__}")
    return first


def examine(model: nn.Module, caches: Sequence[CacheKind], config: dict[str, Any]) -> Anatomy:
    """Finds body, blocks, head and packing of a model, and verifies each on a few tokens."""
    tokens = mx.array([_SECOND], mx.int32)
    logits = model(tokens, cache=None)
    mx.eval(logits)
    windows = tuple(kind.max_size for kind in caches)
    body, hidden = _find_body(model, tokens, logits)
    blocks = None if body is None else _find_blocks(model, body, tokens, hidden)
    head = None if body is None else _find_head(model, body, hidden, config)
    packing = _find_packing(model, caches, windows)
    notes = [
        *([_NO_SPLIT] if body is None else []),
        *([_NO_MATRIX] if body is not None and head is None else []),
        *([_NO_BLOCKS] if body is not None and blocks is None else []),
        *([_NO_PACKING] if packing == "none" else []),
    ]
    return Anatomy(
        body,
        blocks,
        head,
        packing,
        windows,
        num_layers=len(model.layers),
        hidden_size=0 if body is None else hidden.shape[-1],
        vocab_size=logits.shape[-1],
        notes=tuple(notes),
    )


def _agree(found: mx.array, expected: mx.array, tolerances: tuple[float, float]) -> bool:
    """Whether two sets of rows differ by little, in the mean square, against the spread of `expected`.

    Args:
        found, expected: [..., n].
        tolerances: in float32, in half precision.
    """
    if found.shape != expected.shape:
        return False
    tolerance = tolerances[0] if expected.dtype == mx.float32 else tolerances[1]
    rows = expected.astype(mx.float32)
    spread = mx.square(rows - rows.mean(axis=-1, keepdims=True)).sum()
    return bool(mx.square(found.astype(mx.float32) - rows).sum() <= tolerance**2 * spread)


def _attempt(check: Callable[[], bool]) -> bool:
    """Whether a check holds; a model that does not take the call fails it in one of many ways."""
    try:
        return check()
    except _FAILURES:
        return False


def _find_body(model: nn.Module, tokens: mx.array, logits: mx.array) -> tuple[Path | None, mx.array]:
    holder = path_to_blocks(model)
    for end in range(len(holder or ()) - 1, 0, -1):
        body, hidden = (holder or ())[:end], logits

        def splits(body: Path = body) -> bool:
            states, _ = run_body(model, body, None, tokens, None, ())
            some = run_head(model, body, states[0, 1:4])
            if states.shape == logits.shape and _agree(states, logits, _ROUNDING):
                return False  # the head is inside
            whole = run_head(model, body, states)
            return _agree(whole, logits, _ROUNDING) and _agree(some, logits[0, 1:4], _ROUNDING)

        if isinstance(at(model, body), nn.Module) and _attempt(splits):
            hidden, _ = run_body(model, body, None, tokens, None, ())
            return body, hidden
    return None, logits


def path_to_blocks(model: nn.Module) -> Path | None:
    """Path to the list that holds `model.layers`."""
    wanted = list(model.layers)
    for path, value in _lists(model, ()):
        if len(value) == len(wanted) and all(a is b for a, b in zip(value, wanted, strict=True)):
            return path
    return None


def _lists(module: nn.Module, prefix: Path) -> Iterator[tuple[Path, list[Any]]]:
    for key, value in module.items():
        if isinstance(value, list) and value and isinstance(value[0], nn.Module):
            yield (*prefix, key), value
        elif isinstance(value, nn.Module):
            yield from _lists(value, (*prefix, key))


def _find_blocks(model: nn.Module, body: Path, tokens: mx.array, hidden: mx.array) -> Path | None:
    path = (path_to_blocks(model) or ())[len(body) :]
    last = len(model.layers) - 1

    def taps() -> bool:
        final, blocks = run_body(model, body, path, tokens, None, (0, last))
        return _agree(final, hidden, _ROUNDING) and all(states.ndim == 3 for states in blocks.values())

    return path if _attempt(taps) else None


def _find_head(model: nn.Module, body: Path, hidden: mx.array, config: dict[str, Any]) -> LinearHead | None:
    def logits_of(states: mx.array) -> mx.array:
        return run_head(model, body, states)

    states = hidden.reshape(-1, hidden.shape[-1])
    tolerance = 1e-4 if hidden.dtype == mx.float32 else 2e-2
    return find_linear_head(model, logits_of, states, config=config, tolerance=tolerance)


def _find_packing(model: nn.Module, caches: Sequence[CacheKind], windows: tuple[int | None, ...]) -> Packing:
    """Compares packed documents with each of them alone, and one document behind two different others."""
    if any(kind.name not in _KV_CACHES for kind in caches):
        return "none"
    first, second = (model(mx.array([ids], mx.int32), cache=None).squeeze(0) for ids in (_FIRST, _SECOND))
    expected = mx.stack([mx.concatenate([first, second]), mx.concatenate([second, first])])
    token_ids = mx.array([_FIRST + _SECOND, _SECOND + _FIRST, _OTHER + _SECOND], mx.int32)
    short, long = len(_FIRST), len(_SECOND)
    layouts = [[0] * short + [1] * long, [0] * long + [1] * short, [0] * short + [1] * long]
    documents = mx.array(layouts, mx.int32)

    def keeps_apart(found: mx.array) -> bool:
        leaks = not _agree(found[2, short:], found[0, short:], _ROUNDING)
        return not leaks and _agree(found[:2], expected, _PACKED)

    def in_a_batch() -> bool:
        return keeps_apart(model(token_ids, cache=document_caches(documents, windows)))

    def row_by_row() -> bool:
        rows = [
            model(token_ids[i : i + 1], cache=document_caches(documents[i : i + 1].squeeze(0), windows))
            for i in range(len(layouts))
        ]
        return keeps_apart(mx.concatenate(rows))

    if _attempt(in_a_batch):
        return "batch"
    return "rows" if _attempt(row_by_row) else "none"
