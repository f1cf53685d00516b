"""The chunked head over heads of models: linear, quantized, with adapters, tied to the embedding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from pmetal_distill.losses.chunked_head import Backend, HeadOptions, head_loss
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.functional import divergence_loss, hard_cross_entropy
from pmetal_distill.losses.head import HeadParts, PackedWeight
from schemas.errors import UsageError
from tests.pmetal_distill.head_cases import BACKENDS
from tests.pmetal_distill.loss_cases import Case, make_case


def model_head(module: nn.Module) -> Any:
    """A model's head around a layer."""

    @dataclass
    class Wrapped:
        module: nn.Module
        scale: float | None = None
        softcap: float | None = None

    return Wrapped(module)


def layer_loss(case: Case, backend: Backend) -> Callable[[nn.Module, mx.array], mx.array]:
    def loss(module: nn.Module, hidden: mx.array) -> mx.array:
        return head_loss(
            hidden, HeadParts.of(model_head(module)), case.target.at(2.0), mx.array(case.labels),
            mx.array(case.mask), options=HeadOptions(backend=backend, chunk_tokens=3),
        ).total  # fmt: skip

    return loss


def direct_loss(case: Case) -> Callable[[nn.Module, mx.array], mx.array]:
    def loss(module: nn.Module, hidden: mx.array) -> mx.array:
        logits = module.as_linear(hidden) if hasattr(module, "as_linear") else module(hidden)
        mask, labels = mx.array(case.mask), mx.array(np.where(case.mask > 0, case.labels, -100))
        soft = divergence_loss(logits, case.target, divergence=case.divergence, temperature=2.0)
        hard = hard_cross_entropy(logits, labels)
        return 0.5 * 4 * (soft * mask).sum() / mask.sum() + 0.5 * hard.sum() / (labels != -100).sum()

    return loss


def adapted(kind: str) -> nn.Module:
    """The layers that a head may be, with adapters that do something."""
    from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

    mx.random.seed(0)
    base = nn.Embedding(96, 64) if "embedding" in kind else nn.Linear(64, 96, bias="bias" in kind)
    if "quantized" in kind:
        base = base.to_quantized(group_size=32, bits=8)
    if "dora" in kind:
        base = (DoRAEmbedding if "embedding" in kind else DoRALinear).from_base(base, r=4, scale=2.0)
    elif "lora" in kind:
        base = (LoRAEmbedding if "embedding" in kind else LoRALinear).from_base(base, r=4, scale=2.0)
    if "ora" in kind:
        base.lora_b = mx.random.normal(base.lora_b.shape) * 0.1
        base.lora_a = mx.random.normal(base.lora_a.shape) * 0.1
        base.freeze()
        base.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    if "frozen" in kind:
        base.freeze()
    return base


LAYERS = [
    "linear", "linear bias", "linear bias frozen", "embedding", "embedding frozen", "quantized linear bias",
    "quantized embedding", "lora linear bias", "lora quantized linear", "lora embedding", "dora linear bias",
    "dora embedding",
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_models(layer: str, backend: Backend) -> None:
    case = make_case("bucket", Divergence(), vocab=96, k=7, num_tokens=8)
    module = adapted(layer)
    hidden = mx.random.normal((8, 64), key=mx.random.key(3))
    found, wanted = layer_loss(case, backend)(module, hidden), direct_loss(case)(module, hidden)
    np.testing.assert_allclose(found.item(), wanted.item(), rtol=1e-5)
    if module.trainable_parameters():
        _, gradients = nn.value_and_grad(module, layer_loss(case, backend))(module, hidden)
        _, slopes = nn.value_and_grad(module, direct_loss(case))(module, hidden)
        flat, expected_flat = dict(nn.utils.tree_flatten(gradients)), dict(nn.utils.tree_flatten(slopes))
        assert flat.keys() == expected_flat.keys()
        for name, slope in expected_flat.items():
            np.testing.assert_allclose(np.array(flat[name]), np.array(slope), atol=1e-5, err_msg=name)
    by_hidden = mx.grad(lambda h: layer_loss(case, backend)(module, h))(hidden)
    by_hidden_direct = mx.grad(lambda h: direct_loss(case)(module, h))(hidden)
    np.testing.assert_allclose(np.array(by_hidden), np.array(by_hidden_direct), atol=1e-5)


def test_head_adapter_with_dropout_is_refused() -> None:
    from mlx_lm.tuner.lora import LoRALinear

    layer = LoRALinear.from_base(nn.Linear(64, 96), r=4, dropout=0.1)
    with pytest.raises(UsageError, match="dropout 0"):
        HeadParts.of(model_head(layer))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_tied_matrix_add_up(backend: Backend) -> None:
    case = make_case("bucket", Divergence(), vocab=50, k=7, num_tokens=5)
    tokens, weight = mx.array([1, 2, 3, 2, 1]), mx.random.normal((50, 8), key=mx.random.key(0))

    def tied(w: mx.array) -> mx.array:
        return head_loss(
            mx.tanh(w[tokens]), HeadParts(w), case.target.at(2.0), mx.array(case.labels), mx.array(case.mask),
            options=HeadOptions(backend=backend),
        ).total  # fmt: skip

    gradient, h = mx.grad(tied)(weight), 1e-2
    for row, column in ((1, 0), (2, 3), (7, 1)):
        step = mx.zeros_like(weight)
        step[row, column] = h
        difference = (tied(weight + step) - tied(weight - step)).item() / (2 * h)
        assert gradient[row, column].item() == pytest.approx(difference, abs=2e-4)


def test_packed_weight_equals_its_dense_matrix() -> None:
    layer = nn.QuantizedLinear(64, 96, bias=False, group_size=32, bits=4)
    parts = HeadParts.of(model_head(layer))
    assert isinstance(parts.weight, PackedWeight)
    dense = HeadParts(parts.weight.unpacked())
    hidden = mx.random.normal((3, 64), key=mx.random.key(1))
    assert mx.allclose(parts.logits(hidden), dense.logits(hidden), atol=1e-4)
    assert mx.allclose(parts.restricted(40).logits(hidden), dense.logits(hidden)[:, :40], atol=1e-4)
    assert (parts.restricted(40).vocab_size, parts.vocab_size) == (40, 96)
