"""Splits a model's matrices over several processes, by mlx-lm's own `shard`. Costs what `shard` costs."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from schemas.errors import ModelError

_HEADS = ("num_attention_heads", "num_key_value_heads")


def shard_model(
    model: nn.Module, config: dict[str, Any], group: mx.distributed.Group, *, source: str
) -> None:
    """Leaves in each block the part of this process: some of its heads, some columns of its MLP.

    Embeddings, norms and head stay whole. Weights that have not been read yet are read in parts.

    Raises:
        ModelError: mlx-lm cannot split this kind of model, or not into so many parts.
    """
    without = "run it without --sharded"
    if not hasattr(model, "shard"):
        raise ModelError(
            f"{source}: must be of a kind that mlx_lm can shard, found model_type "
            f"'{config['model_type']}', which has no such method; {without}"
        )
    # `shard` rounds down where heads do not divide, and the model would be another one.
    for key in _HEADS:
        for part in (config, config.get("text_config") or {}):
            count = part.get(key)
            if isinstance(count, int) and count % group.size():
                raise ModelError(
                    f"{source}: {key} must be a multiple of the number of processes, found {count} for "
                    f"{group.size()}; start as many as divide it, or {without}"
                )
    try:
        model.shard(group)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{source}: mlx_lm cannot split it into {group.size()} parts ({error}); start fewer processes, "
            f"or {without}"
        ) from error
