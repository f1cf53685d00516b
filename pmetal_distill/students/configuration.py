"""What a configuration says of layers, cut with them: counts, lists, patterns, numbers. Costs nothing.

Which key means what is not known for every architecture: a list as long as the model is deep has an entry for
each layer, a list of ascending numbers under a name like `full_attn_idxs` names some of them. What comes out
is checked by building the model.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pmetal_distill.modelling.evidence import FAILURES
from pmetal_distill.models import LoadedModel
from pmetal_distill.students.pruned import LAYER_COUNTS, text_config
from schemas.errors import ModelError

_NOT_PER_LAYER = ("token_id", "architectures", "factor")
_NUMBERS = re.compile(r"(layers|layer_ids|idxs?|indices|layers_enum)$")
_FROM_ONE = ("kda_layers", "full_attn_layers")
_FIRST = ("first_k_dense_replace", "num_dense_layers")
_LAST = ("num_kv_shared_layers", "num_kv_reuse_layers")
_GROWS_WITH_DEPTH = "scale_depth"


def pruned_config(loaded: LoadedModel, config: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """`config`, changed in place, for a model of the layers `layers` of `loaded`.

    Raises:
        ModelError: it names no number of layers.
    """
    text, depth = text_config(config), loaded.num_layers
    if not _cut(text, depth, layers):
        raise ModelError(
            f"{loaded.source}: config.json must name the number of layers ({', '.join(LAYER_COUNTS)}), found "
            f"none of {depth}; give a student model instead"
        )
    for args, key, value in _derived_lists(loaded):
        kept = [value[layer] for layer in layers]
        if text.get(key) is None and _derived(args, text, key) != kept:
            text[key] = kept
    if isinstance(scale := text.get(_GROWS_WITH_DEPTH), int | float):
        # Each block adds scale_depth / sqrt(number of layers) of its output (MiniCPM), which must stay.
        text[_GROWS_WITH_DEPTH] = scale * math.sqrt(len(layers) / depth)
    return config


def _derived_lists(loaded: LoadedModel) -> Iterator[tuple[Any, str, list[Any]]]:
    """Lists with an entry for each layer that mlx-lm has worked out: its arguments, key, list."""
    for _, module in loaded.model.named_modules():
        for args in (getattr(module, name, None) for name in ("args", "config")):
            if not dataclasses.is_dataclass(args):
                continue
            if any(getattr(args, key, None) == loaded.num_layers for key in LAYER_COUNTS):
                for field in dataclasses.fields(args):
                    value = getattr(args, field.name, None)
                    if isinstance(value, list | tuple) and len(value) == loaded.num_layers and _plain(value):
                        yield args, field.name, list(value)
                return


def _derived(args: Any, config: dict[str, Any], key: str) -> list[Any] | None:
    """What mlx-lm works out of another configuration; None where it cannot."""
    try:
        value = getattr(type(args).from_dict(copy.deepcopy(config)), key)
    except FAILURES:
        return None
    return list(value) if isinstance(value, list | tuple) else None


def _plain(values: Sequence[Any]) -> bool:
    return all(isinstance(value, bool | int | float | str) for value in values)


def _cut(config: dict[str, Any], depth: int, layers: Sequence[int]) -> bool:
    """Cuts every entry, nested ones too, in place; whether one of them said how deep the model is."""
    said = False
    for key, value in config.items():
        if key in LAYER_COUNTS and value == depth:
            config[key], said = len(layers), True
        elif key in _FIRST and isinstance(value, int):
            config[key] = sum(layer < value for layer in layers)
        elif key in _LAST and isinstance(value, int):
            config[key] = sum(layer >= depth - value for layer in layers)
        elif isinstance(value, dict):
            _cut(value, depth, layers)
        elif (numbers := _numbers(key, value, depth)) is not None:
            config[key] = _renumbered(key, numbers, layers, as_text=isinstance(value, str))
        elif isinstance(value, list | str) and len(value) == depth and not _is_other(key, value):
            kept = [value[layer] for layer in layers]
            config[key], said = ("".join(kept) if isinstance(value, str) else kept), True
    return said


def _is_other(key: str, value: Any) -> bool:
    if isinstance(value, str):
        return "pattern" not in key
    return any(part in key for part in _NOT_PER_LAYER)


def _numbers(key: str, value: Any, depth: int) -> list[int] | None:
    """Numbers of layers under a key, if that is what it holds."""
    if not _NUMBERS.search(key):
        return None
    if isinstance(value, str) and re.fullmatch(r"\d+(,\d+)*", value):
        value = [int(number) for number in value.split(",")]
    if not isinstance(value, list) or not all(type(entry) is int for entry in value):
        return None
    first = 1 if key in _FROM_ONE else 0
    ascending = sorted(set(value)) == value
    return value if ascending and all(first <= v < depth + first for v in value) else None


def _renumbered(key: str, numbers: list[int], layers: Sequence[int], *, as_text: bool) -> list[int] | str:
    first = 1 if key in _FROM_ONE else 0
    kept = [place + first for place, layer in enumerate(layers) if layer + first in numbers]
    return ",".join(map(str, kept)) if as_text else kept
