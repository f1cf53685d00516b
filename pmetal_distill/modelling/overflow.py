"""Where a float16 model leaves the range of its type. Costs one pass, after a model gave no numbers."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from pmetal_distill.modelling.loaded import Documents, LoadedModel
from pmetal_distill.modelling.stand_ins import Tap, states_of, with_blocks


class _Finite(Tap):
    """Is a block in every respect, and remembers whether all that it returned was finite."""

    def __init__(self, body: Any) -> None:
        super().__init__(body)
        self.flags: list[mx.array] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        self.flags.append(_finite(states_of(output)))
        return output


def first_overflowing_layer(
    loaded: LoadedModel, token_ids: mx.array, documents: Documents | None = None
) -> int | None:
    """The first block, from 0, whose output is not finite because float16 ends at 65504.

    Args:
        loaded: a model; its blocks need not be found apart from the rest.
        token_ids, documents: integers [B, L], as in `LoadedModel.hidden`.

    Returns:
        None if all outputs are finite, the model does not compute in float16, or a weight is not finite.
    """
    tensors: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    if all(tensor.dtype != mx.float16 for tensor in tensors.values()):
        return None
    taps = [_Finite(block) for block in loaded.model.layers]
    watched = with_blocks(loaded.model, taps)
    if watched is None:
        return None
    logits = replace(loaded, model=watched).full(token_ids, documents)
    finite = mx.stack([mx.stack(tap.flags).all() for tap in taps])
    mx.eval(finite, logits)
    layers = [layer for layer, ok in enumerate(finite.tolist()) if not ok]  # type: ignore[arg-type]
    return layers[0] if layers and _weights_are_finite(loaded.model.layers[layers[0]]) else None


def overflow(layer: int) -> str:
    """What to tell a user about it."""
    return f"layer {layer}: float16 overflows (max 65504); use --dtype bfloat16"


def _weights_are_finite(block: nn.Module) -> bool:
    tensors: dict[str, mx.array] = dict(tree_flatten(block.parameters()))
    return all(bool(_finite(tensor)) for tensor in tensors.values())


def _finite(values: mx.array) -> mx.array:
    return mx.isfinite(values).all()
