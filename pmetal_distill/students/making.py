"""Writes students made of a teacher's parts as folders that mlx_lm loads. Costs one write of the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pmetal_distill.modelling.evidence import FAILURES, Probe
from pmetal_distill.modelling.folders import new_folder
from pmetal_distill.models import LoadedModel, build_model, open_model, write_model_files
from pmetal_distill.students.layers import fitting_layers, prune_layers, require_same_kinds
from pmetal_distill.students.pruned import PrunedModel
from pmetal_distill.students.width import prune_mlp
from schemas.errors import ModelError, UsageError


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
        num_layers: instead, how many, evenly spaced, or as near to that as the pattern of layers of different
            kinds allows; all if neither is given.
        neurons: for each layer of the teacher, which neurons of its MLP to keep; all if None.
        out: must be missing or empty; appears whole or not at all.

    Returns:
        `out`.

    Raises:
        UsageError: nothing is to be left out, layers are given in both ways, layers or neurons are out of
            range, or the folder is in use.
        ModelError: a kept layer would become another kind of layer at its new position, the MLPs are of a
            kind that cannot be cut, or the student does not run.
    """
    ways = (keep_layers is not None) + (num_layers is not None)
    if ways > 1 or (ways == 0 and neurons is None):
        raise UsageError("init_student takes keep_layers or num_layers, one of the two")
    if num_layers is not None:
        keep_layers = fitting_layers(teacher, num_layers)
    layers = range(teacher.num_layers) if keep_layers is None else keep_layers
    pruned = PrunedModel.whole(teacher) if neurons is None else prune_mlp(teacher, neurons)
    pruned = prune_layers(teacher, layers, pruned=pruned)
    kept = [index % teacher.num_layers for index in layers]
    _require_pattern(teacher, pruned.config, kept)
    with new_folder(Path(out)) as draft:
        write_model_files(draft, pruned.weights, teacher.tokenizer, pruned.config)
        student, _ = open_model(draft, source=str(out), lazy=True)
        require_same_kinds(teacher, student, kept)
        require_running(student, teacher.vocab_size, source=str(out))
    return Path(out)


def _require_pattern(teacher: LoadedModel, config: dict[str, Any], layers: Sequence[int]) -> None:
    """Before weights are written: a mismatch of kinds would otherwise be one of the names of weights."""
    if not config.get("model_file"):
        require_same_kinds(teacher, build_model(config), layers)


def require_running(student: nn.Module, vocab_size: int, *, source: str) -> None:
    """Runs a model on eight tokens. Costs reading its weights.

    Raises:
        ModelError: it fails, or gives no numbers.
    """
    try:
        logits = student(Probe.below(vocab_size).alone, cache=None)
        finite = bool(mx.isfinite(logits).any())
    except FAILURES as error:
        raise ModelError(
            f"{source}: a student must run, found that it fails on a few tokens ({type(error).__name__}: "
            f"{error}); keep more layers, or others"
        ) from error
    if not finite:
        raise ModelError(f"{source}: a student must give numbers, found none; keep more layers, or others")
