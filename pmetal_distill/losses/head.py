"""The student's head as the chunked loss needs it: a matrix, and which parts of it learn. Free to make.

Dense heads are used as they are. Quantized heads stay packed and frozen. A head under LoRA or DoRA becomes
its effective matrix [V, d], through which MLX carries the gradient to the adapter. Where a model makes its
logits in another way, they stand where hidden states do, and `Identity` in the place of the matrix.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from schemas.errors import UsageError


class ModelHead(Protocol):
    """A model's head: logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`."""

    @property
    def module(self) -> nn.Module:
        """The embedding or linear layer that holds the parameters."""
        ...

    @property
    def scale(self) -> float | None:
        """None for 1."""
        ...

    @property
    def softcap(self) -> float | None:
        """None for none."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A quantized matrix, as `mx.quantize` makes it."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str = "affine"

    def multiply(self, x: mx.array, *, transpose: bool) -> mx.array:
        """x @ W.T if `transpose`, else x @ W."""
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def unpacked(self) -> mx.array:
        """The dense matrix [V, d]."""
        return mx.dequantize(
            self.weight,
            self.scales,
            self.biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    @property
    def num_rows(self) -> int:
        """V."""
        return int(self.weight.shape[0])

    def rows(self, count: int) -> "PackedWeight":
        """The first `count` rows."""
        biases = None if self.biases is None else self.biases[:count]
        return replace(self, weight=self.weight[:count], scales=self.scales[:count], biases=biases)


@dataclass(frozen=True, slots=True)
class Identity:
    """The matrix of a head whose hidden states are logits already: the first rows of the identity.

    Attributes:
        num_rows: V.
        width: of the states, at least V.
    """

    num_rows: int
    width: int

    def multiply(self, x: mx.array, *, transpose: bool) -> mx.array:
        """x @ W.T, which leaves columns out, if `transpose`; else x @ W, which adds zeros."""
        if transpose:
            return x[..., : self.num_rows]
        return x if self.width == self.num_rows else mx.pad(x, [(0, 0), (0, self.width - self.num_rows)])

    def rows(self, count: int) -> "Identity":
        """The first `count` rows."""
        return Identity(count, self.width)


@dataclass(frozen=True, slots=True, eq=False)
class HeadParts:
    """A head taken apart.

    Attributes:
        weight: [V, d], or packed, or none because the states are logits.
        bias: [V] or None.
        scale: of the products; None for 1.
        softcap: of the logits; None for none.
        trains_weight, trains_bias: whether a gradient is wanted.
    """

    weight: mx.array | PackedWeight | Identity
    bias: mx.array | None = None
    scale: float | None = None
    softcap: float | None = None
    trains_weight: bool = True
    trains_bias: bool = True

    @staticmethod
    def of(head: ModelHead) -> "HeadParts":
        """The parts of a model's head, read now: call it inside the function that is differentiated.

        Raises:
            UsageError: an adapter with dropout, which the chunked head cannot apply.
        """
        module = head.module
        if "lora_a" in module:
            return HeadParts(_adapted(module), _bias(module), head.scale, head.softcap, trains_bias=False)
        learns = module.trainable_parameters()
        return HeadParts(
            _weight(module), _bias(module), head.scale, head.softcap, "weight" in learns, "bias" in learns
        )

    @staticmethod
    def of_logits(vocab_size: int) -> "HeadParts":
        """The head that changes nothing, for logits in the place of hidden states."""
        return HeadParts(Identity(vocab_size, vocab_size))

    @property
    def vocab_size(self) -> int:
        """V."""
        weight = self.weight
        return int(weight.shape[0]) if isinstance(weight, mx.array) else weight.num_rows

    def restricted(self, vocab_size: int) -> "HeadParts":
        """The head for the first `vocab_size` tokens; vocabularies are padded to different sizes."""
        if vocab_size == self.vocab_size:
            return self
        whole = self.weight
        weight = whole[:vocab_size] if isinstance(whole, mx.array) else whole.rows(vocab_size)
        return replace(self, weight=weight, bias=None if self.bias is None else self.bias[:vocab_size])

    def in_type(self, dtype: mx.Dtype) -> "HeadParts":
        """The head for products with hidden states of a type: a float32 master is cast to it, once."""
        if not isinstance(self.weight, mx.array) or self.weight.dtype == dtype:
            return self
        bias = None if self.bias is None else self.bias.astype(dtype)
        return replace(self, weight=self.weight.astype(dtype), bias=bias)

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states [n, d] -> logits [n, V]."""
        if isinstance(self.weight, mx.array):
            raw = hidden @ self.weight.T
        else:
            raw = self.weight.multiply(hidden, transpose=True)
        raw = raw if self.bias is None else raw + self.bias
        raw = raw if self.scale is None else raw * self.scale
        return raw if self.softcap is None else mx.tanh(raw / self.softcap) * self.softcap

    def through_cap(self, rows: mx.array, logits: mx.array) -> mx.array:
        """Gradient by the logits -> gradient by the products `hidden @ weight.T`, [n, V]."""
        if self.softcap is not None:
            rows = rows * (1.0 - mx.square(logits.astype(mx.float32) / self.softcap))
        return rows if self.scale is None else rows * self.scale

    def back(self, rows: mx.array) -> mx.array:
        """Gradient by the products [n, V] -> gradient by the hidden states [n, d]."""
        if isinstance(self.weight, mx.array):
            return rows @ self.weight
        return self.weight.multiply(rows, transpose=False)

    def parameters(self) -> dict[str, mx.array]:
        """The arrays that want a gradient, by field name."""
        found: dict[str, mx.array] = {}
        if self.trains_weight and isinstance(self.weight, mx.array):
            found["weight"] = self.weight
        if self.trains_bias and self.bias is not None:
            found["bias"] = self.bias
        return found


def _weight(module: nn.Module) -> mx.array | PackedWeight:
    weight: mx.array = module["weight"]
    if "scales" not in module:
        return weight
    return PackedWeight(
        weight, module["scales"], module.get("biases"), module.group_size, module.bits, module.mode
    )


def _bias(module: nn.Module) -> mx.array | None:
    bias: mx.array | None = module.get("linear", module).get("bias")
    return bias


def _adapted(module: nn.Module) -> mx.array:
    """The effective matrix of an mlx-lm LoRA or DoRA layer around a linear or embedding layer."""
    if getattr(module.get("dropout"), "_p_1", 1.0) < 1.0:
        raise UsageError("the head's adapter must have dropout 0, found more; leave the head out of the keys")
    packed = _weight(module.get("linear") or module["embedding"])
    base = packed.unpacked() if isinstance(packed, PackedWeight) else packed
    a, b, scale = module["lora_a"], module["lora_b"], module.scale
    update = (scale * b.T) @ a.T if "linear" in module else (scale * a) @ b
    weight: mx.array = base + update.astype(base.dtype)
    if "m" not in module:
        return weight
    norm = mx.stop_gradient(mx.linalg.norm(weight, axis=1))
    magnitude: mx.array = module["m"]
    return (magnitude / norm)[:, None] * weight
