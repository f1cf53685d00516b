"""Gradient checkpointing: blocks keep only their inputs, and run again in the backward pass.

Costs about one more forward pass of the blocks; saves their activations. It is a property of the given
blocks, not of their class, so that another model of the same architecture (a live teacher) is left alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from pmetal_distill.device import on_cpu
from pmetal_distill.losses.host import can_evaluate


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Makes each block recompute its activations in the backward pass, while it is in training mode.

    Gradients stay the same: dropout drops in the second run what it dropped in the first. Adapters have to be
    added before.
    """
    subclasses: dict[type[nn.Module], type[nn.Module]] = {}
    for block in blocks:
        kind = type(block)
        if not hasattr(kind, "dropout_keys"):
            block.__class__ = subclasses.setdefault(kind, _recomputing(kind))
            block.dropout_keys = _give_keys(block)


@dataclass(slots=True)
class _Keys:
    """Random keys for the dropout layers of a block, drawn from `key` during one run of it."""

    key: mx.array | None = None

    def next(self) -> mx.array | None:
        if self.key is None:
            return None
        self.key, drawn = mx.random.split(self.key)
        return drawn


class _KeyedDropout(nn.Dropout):  # type: ignore[misc]
    """Dropout that draws from the keys of its block."""

    dropout_keys: _Keys

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        kept = mx.random.bernoulli(self._p_1, x.shape, key=self.dropout_keys.next())
        return (kept * x) * (1 / self._p_1)


def _give_keys(block: nn.Module) -> _Keys:
    keys = _Keys()
    for module in block.modules():
        if type(module) is nn.Dropout and module._p_1 < 1:
            module.__class__ = _KeyedDropout
            module.dropout_keys = keys
    return keys


def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    call = kind.__call__

    def recomputing_call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return call(block, *args, **kwargs)

        forward = True

        def run(key: mx.array, parameters: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal forward
            with _given(block, key, parameters):
                outputs = call(block, *args, **kwargs)
            if forward:
                outputs, forward = tree_map(_without_graph, outputs), False
            return outputs

        key = mx.random.randint(0, 2**32 - 1, (2,), mx.uint32)
        return mx.checkpoint(run)(key, block.trainable_parameters(), *args, **kwargs)

    body = {"__call__": recomputing_call, "__module__": kind.__module__, "dropout_keys": None}
    return type(kind.__name__, (kind,), body)


def _without_graph(output: Any) -> Any:
    """The values alone, where they can be had now.

    On the CPU the head's loss evaluates its inputs while a gradient is being traced, which keeps every array
    in their graph. `mx.checkpoint` wants nothing of this graph: the backward pass makes its own.
    """
    eager = on_cpu() and getattr(output, "dtype", None) == mx.float32
    return mx.array(np.array(output)) if eager and can_evaluate(output) else output


@contextmanager
def _given(block: nn.Module, key: mx.array, parameters: Any) -> Iterator[None]:
    """The block under the parameters and the random key that a transformation traces."""
    outside = block.trainable_parameters()
    block.update(parameters)
    block.dropout_keys.key = mx.stop_gradient(key)
    try:
        yield
    finally:
        block.update(outside)
        block.dropout_keys.key = None
