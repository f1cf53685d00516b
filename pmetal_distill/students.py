"""Students: a teacher with fewer layers, or a fresh model of a configuration. Costs one write of the weights.

A student keeps the teacher's tokenizer and vocabulary, so cached ids mean the same to both.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from pmetal_distill.modelling.anatomy import path_to_blocks
from pmetal_distill.modelling.folders import new_folder
from pmetal_distill.models import LoadedModel, build_model, open_model, save_model, write_model_files
from schemas.errors import ModelError, UsageError

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NOT_PER_LAYER = ("token_id", "architectures", "factor")
_POSITIONS = ("layer_idx", "layer_id", "layer_index", "layer_num", "idx")


@dataclass(frozen=True, slots=True)
class PrunedModel:
    """Weights by name, and the configuration that fits them."""

    weights: dict[str, mx.array]
    config: dict[str, Any]


def evenly_spaced(num_layers: int, keep_count: int) -> list[int]:
    """Which layers to keep, evenly spread, the first and the last always among them (the first alone for 1).

    Raises:
        UsageError: `keep_count` is not from 1 to `num_layers`.
    """
    if not 1 <= keep_count <= num_layers:
        raise UsageError(f"num_layers must be from 1 to {num_layers}, the teacher's, found {keep_count}")
    if keep_count == 1:
        return [0]
    gaps, last = keep_count - 1, num_layers - 1
    return [(2 * index * last + gaps) // (2 * gaps) for index in range(keep_count)]


def init_student(
    teacher: LoadedModel,
    *,
    keep_layers: Sequence[int] | None = None,
    num_layers: int | None = None,
    out: str | Path,
) -> Path:
    """Writes a student made of some of the teacher's layers, as a folder that mlx_lm loads.

    Args:
        teacher: a loaded model; its weights are not copied until they are written.
        keep_layers: which layers, ascending, from 0; negative counts from the end.
        num_layers: instead, how many, evenly spaced.
        out: must be missing or empty; appears whole or not at all.

    Returns:
        `out`.

    Raises:
        UsageError: both or none of the two are given, layers out of range, or the folder is in use.
        ModelError: a kept layer would become another kind of layer at its new position.
    """
    if (keep_layers is None) == (num_layers is None):
        raise UsageError("init_student takes keep_layers or num_layers, one of the two")
    if keep_layers is None:
        keep_layers = evenly_spaced(teacher.num_layers, num_layers or 0)
    pruned = prune_layers(teacher, keep_layers)
    with new_folder(Path(out)) as draft:
        write_model_files(draft, pruned.weights, teacher.tokenizer, pruned.config)
        student, _ = open_model(draft, source=str(out), lazy=True)
        _require_same_kinds(teacher, student, [index % teacher.num_layers for index in keep_layers])
    return Path(out)


def prune_layers(loaded: LoadedModel, keep: Sequence[int]) -> PrunedModel:
    """The weights and the configuration of `loaded` with only the layers `keep`.

    Args:
        loaded: any model whose layers are in one list.
        keep: ascending, from 0; negative counts from the end.

    Raises:
        UsageError: no layer, one out of range, twice, or not in ascending order.
        ModelError: the layers or their number are not where they can be found.
    """
    layers = _checked_layers(keep, loaded.num_layers)
    path = path_to_blocks(loaded.model)
    if path is None:
        raise ModelError(
            f"{loaded.source}: the layers of this model are not in one list; give a student model instead"
        )
    prefix = ".".join(path) + "."
    weights: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    renamed = {_renumbered(name, prefix, layers): tensor for name, tensor in weights.items()}
    kept = {name: tensor for name, tensor in renamed.items() if name is not None}
    return PrunedModel(kept, _pruned_config(loaded, prefix, layers))


def fresh_student(config: Mapping[str, Any], tokenizer: Any, out: str | Path, seed: int) -> Path:
    """Writes an untrained model, with mlx-lm's own initialisation.

    Args:
        config: as in config.json.
        tokenizer: the teacher's; it must fit into `vocab_size`.
        out: must be missing or empty; appears whole or not at all.
        seed: of the weights. The global random state is left as it was.

    Returns:
        `out`.

    Raises:
        UsageError: the vocabulary is too small, or the folder is in use.
        ModelError: mlx-lm cannot build this configuration.
    """
    vocab_size, needed = _text_config(config).get("vocab_size"), len(tokenizer)
    if not isinstance(vocab_size, int) or vocab_size < needed:
        raise UsageError(
            f"config: vocab_size must be at least {needed}, the tokenizer's size, found {vocab_size!r}"
        )
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        mx.random.seed(seed)
        model = build_model(config)
        mx.eval(model.parameters())
    finally:
        mx.random.seed(high << 32 | low)
    return save_model(model, out, tokenizer=tokenizer, config=config)


def _checked_layers(keep: Sequence[int], num_layers: int) -> list[int]:
    where = f"layers to keep must be from 0 to {num_layers - 1}, ascending, each once"
    if not keep:
        raise UsageError(f"{where}; found none: name at least one")
    for index in keep:
        if not -num_layers <= index < num_layers:
            raise UsageError(f"{where}; found {index}")
    layers = [index % num_layers for index in keep]
    for before, after in pairwise(layers):
        if after <= before:
            raise UsageError(f"{where}; found {after} after {before}")
    return layers


def _renumbered(name: str, prefix: str, layers: list[int]) -> str | None:
    """The name of a tensor in the pruned model, None if it is gone."""
    if not name.startswith(prefix):
        return name
    number, _, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{layers.index(int(number))}.{rest}" if int(number) in layers else None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model, which a wrapper of several models nests."""
    nested = config.get("text_config")
    return (
        nested if isinstance(nested, Mapping) and not any(key in config for key in _LAYER_COUNTS) else config
    )


def _pruned_config(loaded: LoadedModel, prefix: str, layers: list[int]) -> dict[str, Any]:
    config = copy.deepcopy(loaded.config)
    text: Any = _text_config(config)
    counts = [key for key in _LAYER_COUNTS if text.get(key) == loaded.num_layers]
    if not counts:
        raise ModelError(
            f"{loaded.source}: config.json names no number of layers ({', '.join(_LAYER_COUNTS)})"
        )
    for key, value in text.items():
        if key in counts:
            text[key] = len(layers)
        elif isinstance(value, list) and len(value) == loaded.num_layers and not _is_other_list(key):
            text[key] = [value[index] for index in layers]
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            renamed = {_renumbered(name, prefix, layers): value for name, value in config[key].items()}
            config[key] = {name: value for name, value in renamed.items() if name is not None}
    return config


def _is_other_list(key: str) -> bool:
    return any(part in key for part in _NOT_PER_LAYER)


def _require_same_kinds(teacher: LoadedModel, student: nn.Module, layers: list[int]) -> None:
    """Some architectures decide by a layer's position what kind it is (sliding attention, experts)."""
    for position, index in enumerate(layers):
        before, after = _traits(teacher.model.layers[index]), _traits(student.layers[position])
        if before != after:
            differing = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
            raise ModelError(
                f"{teacher.source}: layer {index} would be another kind of layer at position {position} "
                f"({differing[0]} differs); keep layers whose positions have the same pattern"
            )


def _traits(layer: nn.Module) -> dict[str, Any]:
    """Classes and plain settings of a layer and its parts, positions left out."""
    traits: dict[str, Any] = {}
    for path, module in layer.named_modules():
        traits[path] = type(module).__name__
        for key, value in vars(module).items():
            if (
                isinstance(value, bool | int | float | str)
                and key not in _POSITIONS
                and not key.startswith("_")
            ):
                traits[f"{path}.{key}".lstrip(".")] = value
    return traits
