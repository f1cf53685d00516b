"""Students with fewer layers: which ones, and their weights under new numbers. Copies no weights."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pmetal_distill.models import LoadedModel
from pmetal_distill.students.pruned import LAYER_COUNTS, PrunedModel, blocks_prefix, text_config
from schemas.errors import ModelError, UsageError

_NOT_PER_LAYER = ("token_id", "architectures", "factor")


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


def prune_layers(
    loaded: LoadedModel, keep: Sequence[int], *, pruned: PrunedModel | None = None
) -> PrunedModel:
    """The weights and the configuration of `loaded` with only the layers `keep`.

    Args:
        loaded: any model whose layers are in one list.
        keep: ascending, from 0; negative counts from the end.
        pruned: instead of all of `loaded`, what another kind of pruning has left of it.

    Raises:
        UsageError: no layer, one out of range, twice, or not in ascending order.
        ModelError: the layers or their number are not where they can be found.
    """
    layers = checked_layers(keep, loaded.num_layers)
    prefix = blocks_prefix(loaded)
    before = pruned or PrunedModel.whole(loaded)
    renamed = {_renumbered(name, prefix, layers): tensor for name, tensor in before.weights.items()}
    kept = {name: tensor for name, tensor in renamed.items() if name is not None}
    return PrunedModel(kept, _pruned_config(loaded, before.config, prefix, layers))


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


def _renumbered(name: str, prefix: str, layers: list[int]) -> str | None:
    """The name of a tensor in the pruned model, None if it is gone."""
    if not name.startswith(prefix):
        return name
    number, _, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{layers.index(int(number))}.{rest}" if int(number) in layers else None


def _pruned_config(
    loaded: LoadedModel, config: dict[str, Any], prefix: str, layers: list[int]
) -> dict[str, Any]:
    """`config`, changed in place."""
    text = text_config(config)
    counts = [key for key in LAYER_COUNTS if text.get(key) == loaded.num_layers]
    if not counts:
        raise ModelError(
            f"{loaded.source}: config.json names no number of layers ({', '.join(LAYER_COUNTS)})"
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
