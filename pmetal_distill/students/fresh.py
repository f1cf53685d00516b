"""Untrained students of a configuration, with the teacher's embeddings where they fit. Costs one write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from pmetal_distill.modelling.heads import dense_weight
from pmetal_distill.modelling.randomness import seeded
from pmetal_distill.models import LoadedModel, build_model, save_model, wrap_model
from pmetal_distill.students.pruned import text_config
from schemas.errors import UsageError

_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")


def fresh_student(
    config: Mapping[str, Any],
    tokenizer: Any,
    out: str | Path,
    seed: int,
    *,
    teacher: LoadedModel | None = None,
) -> Path:
    """Writes an untrained model, with mlx-lm's own initialisation.

    Args:
        config: as in config.json.
        tokenizer: the teacher's; it must fit into `vocab_size`.
        out: must be missing or empty; appears whole or not at all.
        seed: of the weights. The global random state is left as it was.
        teacher: if given and of the same width, gives its embedding and its head, see `shared_rows`.

    Returns:
        `out`.

    Raises:
        UsageError: the vocabulary is too small, or the folder is in use.
        ModelError: mlx-lm cannot build this configuration.
    """
    vocab_size, needed = text_config(config).get("vocab_size"), len(tokenizer)
    if not isinstance(vocab_size, int) or vocab_size < needed:
        raise UsageError(
            f"config: vocab_size must be at least {needed}, the tokenizer's size, found {vocab_size!r}"
        )
    with seeded(seed):
        model = build_model(config)
        mx.eval(model.parameters())
    if teacher is not None and (rows := shared_rows(config, teacher)):
        _take_over(wrap_model(model, tokenizer, config), teacher, rows)
    return save_model(model, out, tokenizer=tokenizer, config=config)


def shared_rows(config: Mapping[str, Any], teacher: LoadedModel) -> int:
    """How many rows of the teacher's embedding and head a model of this configuration can begin with.

    None if the widths differ; else as many as both have, though only tokens of the tokenizer mean anything.
    """
    text = text_config(config)
    width = next((text[key] for key in _WIDTHS if key in text), None)
    return min(int(text["vocab_size"]), teacher.vocab_size) if width == teacher.hidden_size else 0


def _take_over(student: LoadedModel, teacher: LoadedModel, rows: int) -> None:
    given = _tables(teacher)
    tied = student.head is not None and student.head.tied
    for name, (path, table) in _tables(student).items():
        if name in given and not (name == "head" and tied):
            tensor = mx.concatenate([given[name][1][:rows].astype(table.dtype), table[rows:]])
            student.model.load_weights([(f"{path}.weight", tensor)], strict=False)


def _tables(loaded: LoadedModel) -> dict[str, tuple[str, mx.array]]:
    """Input embedding and head, which may be the same: path and matrix [V, d]."""
    tables = {
        path: dense_weight(module)
        for path, module in loaded.model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        and len(module["weight"]) == loaded.vocab_size
    }
    found = {"embedding": next(iter(tables.items()))} if len(tables) == 1 else {}
    return found if loaded.head is None else found | {"head": (loaded.head.path, loaded.head.weight)}
