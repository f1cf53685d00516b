"""Students with fewer layers: which ones, and their weights under new numbers. Copies no weights.

Where an architecture decides by a layer's position what kind it is (sliding attention, experts, a state space
model), the configuration's lists are cut with the layers, and layers are chosen that keep the pattern.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from pmetal_distill.models import LoadedModel, build_model
from pmetal_distill.students.configuration import pruned_config
from pmetal_distill.students.pruned import LAYER_COUNTS, PrunedModel, renumbered_places, text_config
from schemas.errors import ModelError, UsageError

_NOT_OF_THE_KIND = (
    *("layer_idx", "layer_id", "layer_index", "layer_num", "idx", "intermediate_size", "scale_depth"),
    *LAYER_COUNTS,
)
_NUMBER = re.compile(r"\.\d+\.")


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


def fitting_layers(loaded: LoadedModel, keep_count: int) -> list[int]:
    """Evenly spaced layers, or those nearest to them that are of the kinds that their new positions want.

    Costs building, unevaluated, of up to three models. Where nothing fits, the evenly spaced ones, of which
    `prune_layers` or `require_same_kinds` says what is wrong.

    Raises:
        UsageError: `keep_count` is not from 1 to the number of layers.
    """
    even = evenly_spaced(loaded.num_layers, keep_count)
    kinds = [_traits(layer) for layer in loaded.model.layers]
    skeleton = _skeleton(loaded, even)
    if skeleton is not None:
        positions = [_traits(layer) for layer in skeleton.layers]
        if positions == [kinds[index] for index in even]:
            return even
        if (nearest := _nearest(kinds, positions, even)) is not None and _fits(loaded, nearest, kinds):
            return nearest
    first = list(range(keep_count))
    return first if _fits(loaded, first, kinds) else even


def _skeleton(loaded: LoadedModel, layers: Sequence[int]) -> nn.Module | None:
    """A student without weights; None where it cannot be built."""
    try:
        return build_model(pruned_config(loaded, PrunedModel.whole(loaded).config, list(layers)))
    except (ModelError, IndexError):
        return None


def _fits(loaded: LoadedModel, layers: Sequence[int], kinds: Sequence[dict[str, Any]]) -> bool:
    skeleton = _skeleton(loaded, layers)
    return skeleton is not None and [_traits(layer) for layer in skeleton.layers] == [
        kinds[index] for index in layers
    ]


def _nearest(
    kinds: Sequence[dict[str, Any]], positions: Sequence[dict[str, Any]], wanted: Sequence[int]
) -> list[int] | None:
    """Ascending layers of the kinds of their positions with the least sum of distances to `wanted`."""
    best: list[tuple[int, list[int]] | None] = [(0, [])] + [None] * len(positions)
    for index, kind in enumerate(kinds):
        for place in range(len(positions) - 1, -1, -1):
            before, so_far = best[place], best[place + 1]
            if before is None or kind != positions[place]:
                continue
            distance = before[0] + abs(index - wanted[place])
            if so_far is None or distance < so_far[0]:
                best[place + 1] = (distance, [*before[1], index])
    last = best[-1]
    return None if last is None else last[1]


def prune_layers(
    loaded: LoadedModel, keep: Sequence[int], *, pruned: PrunedModel | None = None
) -> PrunedModel:
    """The weights and the configuration of `loaded` with only the layers `keep`.

    Args:
        loaded: any model whose layers are in lists.
        keep: ascending, from 0; negative counts from the end.
        pruned: instead of all of `loaded`, what another kind of pruning has left of it.

    Raises:
        UsageError: no layer, one out of range, twice, or not in ascending order.
        ModelError: the layers or their number are not where they can be found, or tables with a part for each
            layer are quantized.
    """
    layers = checked_layers(keep, loaded.num_layers)
    before, places = pruned or PrunedModel.whole(loaded), renumbered_places(loaded, layers)
    renamed = {_renamed(name, places): tensor for name, tensor in before.weights.items()}
    kept = {name: tensor for name, tensor in renamed.items() if name is not None}
    _cut_tables(loaded, kept, places, layers)
    config = pruned_config(loaded, before.config, layers)
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            found = {_renamed(name, places): value for name, value in config[key].items()}
            config[key] = {name: value for name, value in found.items() if name is not None}
    return PrunedModel(kept, config)


def checked_layers(keep: Sequence[int], num_layers: int) -> list[int]:
    """From 0, ascending, each once.

    Raises:
        UsageError: they are not.
    """
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


def _renamed(name: str, places: dict[str, str | None]) -> str | None:
    """The name of a tensor in the pruned model, None if it is gone."""
    for match in _NUMBER.finditer(name):
        old = name[: match.end()]
        if old in places:
            new = places[old]
            return None if new is None else new + name[match.end() :]
    return name


def _cut_tables(
    loaded: LoadedModel,
    weights: dict[str, mx.array],
    places: dict[str, str | None],
    layers: Sequence[int],
) -> None:
    """Cuts, in place, tables outside of the layers that have a part for each, as Gemma has."""
    part = text_config(loaded.config).get("hidden_size_per_layer_input")
    if not part:
        return
    columns = mx.array([layer * part + i for layer in layers for i in range(part)])
    inside = tuple(new for new in places.values() if new is not None)
    for name, tensor in weights.items():
        if "per_layer" not in name or name.startswith(inside):
            continue
        if name.endswith((".scales", ".biases")):
            raise ModelError(
                f"{loaded.source}: tables with parts for each layer must not be quantized, found {name}; "
                "take the model before quantization"
            )
        axis = tensor.ndim - 1 if "embed" in name else 0  # of [V, layers x part], or of [layers x part, d]
        if tensor.shape[axis] == part * loaded.num_layers:
            weights[name] = mx.take(tensor, columns, axis=axis)


def require_same_kinds(loaded: LoadedModel, student: nn.Module, layers: Sequence[int]) -> None:
    """Some architectures decide by a layer's position what kind it is (sliding attention, experts).

    Raises:
        ModelError: a layer of `student` is of another kind than the one it was made of.
    """
    for position, index in enumerate(layers):
        before, after = _traits(loaded.model.layers[index]), _traits(student.layers[position])
        if before != after:
            differing = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
            raise ModelError(
                f"{loaded.source}: layer {index} would be another kind of layer at position {position} "
                f"({differing[0]} differs); keep layers whose positions have the same pattern"
            )


def _traits(layer: nn.Module) -> dict[str, Any]:
    """Classes and plain settings of a layer and its parts, positions and quantization left out."""
    traits: dict[str, Any] = {}
    for path, module in layer.named_modules():
        traits[path] = type(module).__name__.removeprefix("Quantized")
        if traits[path] != type(module).__name__:
            continue
        for key, value in vars(module).items():
            if (
                isinstance(value, bool | int | float | str)
                and key not in _NOT_OF_THE_KIND
                and not key.startswith("_")
            ):
                traits[f"{path}.{key}".lstrip(".")] = value
    return traits
