"""Which layers and neurons of a teacher matter, measured on text. Costs passes of the text through blocks.

Layers: influence, 1 - cos(input, output) of a block (Men et al. 2024, arXiv:2403.03853). It is measured again
after each block that is left out: the same scores once and for all give worse students.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from pmetal_distill.modelling.stand_ins import Tap, at, replaced
from pmetal_distill.models import LoadedModel
from pmetal_distill.students.width import down_projections, output_norms
from schemas.errors import ModelError, UsageError

Float64 = NDArray[np.float64]


class SampleBatch(Protocol):
    """Some text."""

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """[B, L]."""
        ...

    @property
    def documents(self) -> NDArray[np.int32]:
        """[B, L]; tokens with different numbers do not see each other, negative is padding."""
        ...


def influential_layers(
    loaded: LoadedModel, count: int, sample: Sequence[SampleBatch], *, told: Callable[[int], Any] = id
) -> list[int]:
    """The layers that stay when the block of least influence is left out, again and again.

    Costs a pass of the sample for each block that is left out.

    Args:
        loaded: the teacher.
        count: how many layers stay.
        sample: a few thousand tokens of the kind of text that counts.
        told: is called with the layer that is left out.

    Raises:
        UsageError: `count` is not from 1 to the number of layers.
        ModelError: the model's blocks cannot be run one without the other.
    """
    if not 1 <= count <= loaded.num_layers:
        raise UsageError(f"num_layers must be from 1 to {loaded.num_layers}, the teacher's, found {count}")
    layers = list(range(loaded.num_layers))
    while len(layers) > count:
        told(layers.pop(int(np.argmin(block_influence(loaded, sample, layers=layers)))))
    return layers


def block_influence(
    loaded: LoadedModel, sample: Sequence[SampleBatch], *, layers: Sequence[int] | None = None
) -> Float64:
    """Mean over tokens of 1 - cos(input, output) of each block.

    Args:
        loaded: the teacher.
        sample: text; padding does not count.
        layers: the only ones that run, ascending from 0; all if None.

    Returns:
        one value for each layer that runs, in [0, 2].

    Raises:
        ModelError: the model's blocks cannot be run one without the other.
    """
    path, blocks = _blocks(loaded)
    watched = [_Watched(blocks[index]) for index in (range(len(blocks)) if layers is None else layers)]
    probe = replace(loaded, model=replaced(loaded.model, path, watched))
    sums, tokens = np.zeros(len(watched)), 0
    for batch in sample:
        real = _run(probe, batch)
        each = mx.stack([((1 - _cosine(block.input, block.output)) * real).sum() for block in watched])
        sums += np.array(each, np.float64)
        tokens += int((batch.documents >= 0).sum())
    return sums / max(tokens, 1)


def neuron_importance(loaded: LoadedModel, sample: Sequence[SampleBatch]) -> list[Float64]:
    """For each layer the root mean square of what each neuron of its MLP adds to the output, [width].

    Costs one pass of the sample.

    Raises:
        ModelError: MLPs of another kind, or blocks that cannot be got at.
    """
    path, blocks = _blocks(loaded)
    places = down_projections(loaded)
    taps = [_Neurons(at(block, place)) for block, place in zip(blocks, places, strict=True)]
    tapped = [replaced(b, place, tap) for b, place, tap in zip(blocks, places, taps, strict=True)]
    probe = replace(loaded, model=replaced(loaded.model, path, tapped))
    sums = [np.zeros(tap.width) for tap in taps]
    tokens = 0
    for batch in sample:
        real = _run(probe, batch)
        for total, tap in zip(sums, taps, strict=True):
            squares = mx.square(tap.input.astype(mx.float32)) * real[..., None]
            total += np.array(squares.sum(axis=(0, 1)), np.float64)
        tokens += int((batch.documents >= 0).sum())
    norms = [output_norms(at(block, place)) for block, place in zip(blocks, places, strict=True)]
    return [np.sqrt(total / max(tokens, 1)) * norm for total, norm in zip(sums, norms, strict=True)]


class _Watched(Tap):
    """Remembers what went in, too."""

    def __call__(self, states: mx.array, *args: Any, **kwargs: Any) -> Any:
        self.input = states
        output = super().__call__(states, *args, **kwargs)
        self.output = output[0] if isinstance(output, tuple) else output
        return output


class _Neurons(_Watched):
    """The projection behind the neurons of an MLP."""

    @property
    def width(self) -> int:
        return int(self._body["weight"].shape[1])


def _blocks(loaded: LoadedModel) -> tuple[tuple[str, ...], list[nn.Module]]:
    anatomy = loaded.anatomy
    if anatomy.body is None or anatomy.blocks is None:
        raise ModelError(
            f"{loaded.source}: the blocks of this model cannot be run one by one; choose layers yourself"
        )
    return (*anatomy.body, *anatomy.blocks), list(loaded.model.layers)


def _run(probe: LoadedModel, batch: SampleBatch) -> mx.array:
    """Runs the body; returns which tokens are real, as numbers [B, L]."""
    documents = batch.documents if probe.supports_packing else None
    mx.eval(probe.hidden(mx.array(batch.token_ids), documents=documents).final)
    return mx.array((batch.documents >= 0).astype(np.float32))


def _cosine(a: mx.array, b: mx.array) -> mx.array:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (a * b).sum(axis=-1) / (mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1))
