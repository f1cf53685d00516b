"""Writes students made of a teacher's parts as folders that mlx_lm loads. Costs one write of the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from pmetal_distill.modelling.folders import new_folder
from pmetal_distill.models import LoadedModel, open_model, write_model_files
from pmetal_distill.students.layers import evenly_spaced, prune_layers
from pmetal_distill.students.pruned import PrunedModel
from pmetal_distill.students.width import prune_mlp
from schemas.errors import ModelError, UsageError

_NOT_OF_THE_KIND = ("layer_idx", "layer_id", "layer_index", "layer_num", "idx", "intermediate_size")


def init_student(
    teacher: LoadedModel,
    *,
    keep_layers: Sequence[int] | None = None,
    num_layers: int | None = None,
    neurons: Sequence[np.ndarray] | None = None,
    out: str | Path,
) -> Path:
    """Writes a student made of parts of the teacher, as a folder that mlx_lm loads.

    Args:
        teacher: a loaded model; its weights are not copied until they are written.
        keep_layers: which layers, ascending, from 0; negative counts from the end.
        num_layers: instead, how many, evenly spaced; all if neither is given.
        neurons: for each layer of the teacher, which neurons of its MLP to keep; all if None.
        out: must be missing or empty; appears whole or not at all.

    Returns:
        `out`.

    Raises:
        UsageError: nothing is to be left out, layers are given in both ways, layers or neurons are out of
            range, or the folder is in use.
        ModelError: a kept layer would become another kind of layer at its new position, or the MLPs are of a
            kind that cannot be cut.
    """
    ways = (keep_layers is not None) + (num_layers is not None)
    if ways > 1 or (ways == 0 and neurons is None):
        raise UsageError("init_student takes keep_layers or num_layers, one of the two")
    if num_layers is not None:
        keep_layers = evenly_spaced(teacher.num_layers, num_layers)
    layers = range(teacher.num_layers) if keep_layers is None else keep_layers
    pruned = PrunedModel.whole(teacher) if neurons is None else prune_mlp(teacher, neurons)
    pruned = prune_layers(teacher, layers, pruned=pruned)
    with new_folder(Path(out)) as draft:
        write_model_files(draft, pruned.weights, teacher.tokenizer, pruned.config)
        student, _ = open_model(draft, source=str(out), lazy=True)
        _require_same_kinds(teacher, student, [index % teacher.num_layers for index in layers])
    return Path(out)


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
                and key not in _NOT_OF_THE_KIND
                and not key.startswith("_")
            ):
                traits[f"{path}.{key}".lstrip(".")] = value
    return traits
