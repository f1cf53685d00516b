"""Tiny students in memory, adapters that change them, and a text to train on."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pmetal_distill.adapters import adapter_weights
from pmetal_distill.models import LoadedModel, wrap_model
from pmetal_distill.teaching import TextBatch
from tests.tiny import random_model, tiny_config

LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def in_memory(*, bits: int | None = None, seed: int = 1, **options: Any) -> LoadedModel:
    """A tiny student; quantized in groups of 32 if `bits` is given."""
    config = tiny_config(**({"num_layers": 3} | options))
    model = random_model(config, seed=seed)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    return wrap_model(model, None, config)


def some_text(rows: int = 2, length: int = 12, seed: int = 0) -> TextBatch:
    """Sequences of two documents each and padding."""
    ids = np.random.default_rng(seed).integers(0, 320, (rows, length)).astype(np.int32)
    documents = np.repeat(np.array([[0] * 4 + [1] * (length - 6) + [-1] * 2], np.int32), rows, axis=0)
    mask = (documents >= 0) & (np.arange(length) != 3) & (np.arange(length) != length - 3)
    labels = np.where(mask, np.roll(ids, -1, axis=1), -100).astype(np.int32)
    return TextBatch(ids, documents, mask, labels)


def stir(model: nn.Module, size: float = 0.05) -> None:
    """Gives adapters weights that change the model, as training does."""
    rng = np.random.default_rng(0)
    stirred = {n: w + size * mx.array(rng.normal(size=w.shape)) for n, w in adapter_weights(model).items()}
    model.load_weights([(n, w.astype(mx.float32)) for n, w in stirred.items()], strict=False)
