"""Random models in few digits, and models whose layers do not listen to their masks. Costs milliseconds."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from pmetal_distill.modelling.documents import DocumentMask
from pmetal_distill.models import LoadedModel, wrap_model
from tests.tiny import random_model, tiny_config

TYPES = ("float32", "tf32", "float16", "bfloat16", "4 bits", "8 bits")


class _Tf32(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        product: mx.array = _ten_digits(x) @ _ten_digits(self["weight"]).T
        return product


def _ten_digits(x: mx.array) -> mx.array:
    """Rounds the 23 binary digits of a mantissa to the 10 that a GPU multiplies with."""
    return ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)


def lower(model: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turns a float32 model into one of a kind of `TYPES`; "tf32" as a GPU would compute."""
    if kind.endswith("bits"):
        nn.quantize(model, group_size=32, bits=int(kind[0]))
    elif kind == "tf32":
        monkeypatch.setattr("pmetal_distill.modelling.evidence.on_gpu", lambda: True)
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = _Tf32
    else:
        model.set_dtype(getattr(mx, kind))
    return model


def deep(kind: str, monkeypatch: pytest.MonkeyPatch, **config: Any) -> tuple[Any, dict[str, Any]]:
    """An untied model of 30 layers, or 8 quantized ones, which are slow; and its configuration."""
    num_layers = 8 if kind.endswith("bits") else 30
    values = tiny_config(num_layers=num_layers, hidden_size=64, tie=False, **config)
    return lower(random_model(values), kind, monkeypatch), values


def deafen(block: Any, *, window: int | None = None) -> None:
    """From now on a block sees every earlier token (in its window), whatever its mask says."""

    class Deaf(type(block)):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            states: mx.array = super().__call__(x, DocumentMask(None).mask(x.shape[1], window), cache)
            return states

    block.__class__ = Deaf


def near_the_edge(token: int, *, layer: int, dtype: mx.Dtype = mx.float16) -> LoadedModel:
    """A model of 4 layers whose first state is 60,000 at this token; the named layer adds 20,000 to it."""
    config = tiny_config(mlp_bias=True, tie=False)
    model = random_model(config)
    model.model.embed_tokens.weight[:, 0] = mx.where(mx.arange(320) == token, 60_000.0, 0.0)
    for number, block in enumerate(model.layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            block.mlp[name].bias = mx.zeros_like(block.mlp[name].bias)
        block.mlp.down_proj.bias[0] = 20_000.0 if number == layer else 0.0
    model.set_dtype(dtype)
    return wrap_model(model, None, config)
