"""A model on its way to a smaller one: weights by name and the configuration for them. Costs nothing."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from pmetal_distill.modelling.stand_ins import path_to_blocks
from pmetal_distill.models import LoadedModel
from pmetal_distill.precision import stored_weights
from schemas.errors import ModelError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


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
