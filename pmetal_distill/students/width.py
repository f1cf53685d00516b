"""Students with narrower MLPs: which neurons, and their weights. Copies the MLPs when they are written.

An MLP is `down(act(gate(x)) * up(x))` or `down(act(up(x)))`. Neuron j is row j of gate and up and column j of
down, so leaving neurons out changes nothing else.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from pmetal_distill.models import LoadedModel
from pmetal_distill.students.pruned import PrunedModel, blocks_prefix, text_config
from schemas.errors import ModelError, UsageError

WIDTH = "intermediate_size"
_IN, _OUT = ("gate_proj", "up_proj"), "down_proj"


def mlp_width(loaded: LoadedModel) -> int:
    """Neurons in each MLP.

    Raises:
        ModelError: a layer has no MLP of the known kind, or they differ in width.
    """
    widths = {int(_mlp(loaded, index)[1][_OUT]["weight"].shape[1]) for index in range(loaded.num_layers)}
    if widths != {text_config(loaded.config).get(WIDTH)}:
        raise ModelError(
            f"{loaded.source}: all MLPs must be as wide as config.json says in {WIDTH}, found widths "
            f"{sorted(widths)}; leave the width as it is"
        )
    return widths.pop()


def down_projections(loaded: LoadedModel) -> list[tuple[str, ...]]:
    """For each layer the path, from its block, of the layer whose inputs are the neurons.

    Raises:
        ModelError: a layer has no MLP of the known kind.
    """
    return [(*_mlp(loaded, index)[0], _OUT) for index in range(loaded.num_layers)]


def output_norms(projection: nn.Module) -> NDArray[np.float64]:
    """Norm of what each neuron adds to the MLP's output when it is 1, [width]."""
    return np.array(mx.linalg.norm(projection["weight"].astype(mx.float32), axis=0), np.float64)


def largest(scores: Sequence[NDArray[np.float64]], width: int) -> list[NDArray[np.int64]]:
    """For each layer the `width` neurons with the largest scores, ascending; the first ones of equals.

    Raises:
        UsageError: there are not so many.
    """
    if not all(1 <= width <= len(score) for score in scores):
        raise UsageError(
            f"mlp_width: must be from 1 to {min(map(len, scores))}, the teacher's, found {width}"
        )
    return [np.sort(np.argsort(-score, kind="stable")[:width]) for score in scores]


def prune_mlp(loaded: LoadedModel, neurons: Sequence[NDArray[np.int64]]) -> PrunedModel:
    """The weights and the configuration of `loaded` with only some neurons.

    Args:
        loaded: a model whose MLPs are as wide as its configuration says, not quantized.
        neurons: for each layer which ones, ascending, the same number of them everywhere.

    Raises:
        UsageError: neurons out of range, not ascending, or not as many in each layer.
        ModelError: MLPs of another kind, or quantized.
    """
    width, pruned, prefix = mlp_width(loaded), PrunedModel.whole(loaded), blocks_prefix(loaded)
    _check(neurons, loaded.num_layers, width)
    for index, kept in enumerate(neurons):
        path, mlp = _mlp(loaded, index)
        chosen = mx.array(kept)
        for name in (*_IN, _OUT):
            for part in mlp.get(name, {}):
                whole = f"{prefix}{index}.{'.'.join((*path, name))}.{part}"
                if name == _OUT and part == "bias":
                    continue
                pruned.weights[whole] = mx.take(pruned.weights[whole], chosen, axis=1 if name == _OUT else 0)
    text_config(pruned.config)[WIDTH] = len(neurons[0])
    return pruned


def _check(neurons: Sequence[NDArray[np.int64]], num_layers: int, width: int) -> None:
    counts = {len(kept) for kept in neurons}
    if len(neurons) != num_layers or len(counts) != 1:
        raise UsageError(f"neurons must be as many in each of {num_layers} layers, found {sorted(counts)}")
    for index, kept in enumerate(neurons):
        if not len(kept) or kept[0] < 0 or kept[-1] >= width or (np.diff(kept) <= 0).any():
            raise UsageError(
                f"neurons of layer {index} must be from 0 to {width - 1}, ascending, found others"
            )


def _mlp(loaded: LoadedModel, index: int) -> tuple[tuple[str, ...], nn.Module]:
    """Path from the block, and the module."""
    block = loaded.model.layers[index]
    found = [(path, part) for path, part in block.named_modules() if "up_proj" in part and _OUT in part]
    if len(found) != 1 or not all(type(found[0][1].get(n, None)) is nn.Linear for n in ("up_proj", _OUT)):
        kinds = sorted({type(part[_OUT]).__name__ for _, part in found})
        raise ModelError(
            f"{loaded.source}: the width can be changed where each layer has one MLP with up_proj and "
            f"down_proj, not quantized; found {len(found)} in layer {index}{', ' if kinds else ''}"
            f"{', '.join(kinds)}; leave the width as it is"
        )
    path, mlp = found[0]
    return tuple(path.split(".")) if path else (), mlp
