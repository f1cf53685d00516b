"""A model on its way to a smaller one: weights by name and the configuration for them. Costs nothing."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from pmetal_distill.modelling.stand_ins import lists_of, path_to_blocks
from pmetal_distill.models import LoadedModel
from pmetal_distill.precision import stored_weights
from schemas.errors import ModelError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")


@dataclass(frozen=True, slots=True)
class PrunedModel:
    """Weights by name, and the configuration that fits them."""

    weights: dict[str, mx.array]
    config: dict[str, Any]

    @staticmethod
    def whole(loaded: LoadedModel) -> "PrunedModel":
        """All of a model, in the types it has on disk."""
        weights: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
        return PrunedModel(stored_weights(weights, loaded.stored), copy.deepcopy(loaded.config))


def text_config(config: Mapping[str, Any]) -> Any:
    """The configuration of the language model, which a wrapper of several models nests."""
    nested = config.get("text_config")
    return (
        nested if isinstance(nested, Mapping) and not any(key in config for key in LAYER_COUNTS) else config
    )


def blocks_prefix(loaded: LoadedModel) -> str:
    """What the names of the blocks' weights begin with: "model.layers.".

    Raises:
        ModelError: the blocks are not in one list.
    """
    path = path_to_blocks(loaded.model)
    if path is None:
        raise ModelError(
            f"{loaded.source}: the layers of this model are not in one list; give a student model instead"
        )
    return ".".join(path) + "."


def renumbered_places(loaded: LoadedModel, layers: Sequence[int]) -> dict[str, str | None]:
    """Prefix of the names of each layer's weights -> its new prefix, None where the layer goes.

    Layers may lie in several lists (some of AFM's reuse the keys of others), and other lists may have an
    entry for each layer.

    Raises:
        ModelError: a layer is in no list.
    """
    lists = {".".join(path): values for path, values in lists_of(loaded.model)}
    blocks = list(loaded.model.layers)
    places = {id(value): (path, i) for path, values in lists.items() for i, value in enumerate(values)}
    if missing := [index for index, block in enumerate(blocks) if id(block) not in places]:
        raise ModelError(
            f"{loaded.source}: all layers must be in lists of the model, found layer {missing[0]} elsewhere; "
            "give a student model instead"
        )
    found: dict[str, str | None] = {}
    counts: dict[str, int] = {}
    for index, block in enumerate(blocks):
        path, number = places[id(block)]
        found[f"{path}.{number}."] = f"{path}.{counts.get(path, 0)}." if index in layers else None
        counts[path] = counts.get(path, 0) + (index in layers)
    for path, values in lists.items():
        if path not in counts and len(values) == len(blocks):
            for index in range(len(blocks)):
                found[f"{path}.{index}."] = f"{path}.{layers.index(index)}." if index in layers else None
    return found
