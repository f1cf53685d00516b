"""Finds the matrix behind a model's logits, by trying. Costs a few head products on a handful of tokens.

A head is `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`, with parts left out. Which matrix it
is, and which scale and soft-cap, is not read off names but verified against the model's own logits. Numbers
that are no round ones of the configuration (mlx-lm's own defaults) are fitted: a soft-cap is where far too
large hidden states lead.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
_LINEARS = (nn.Linear, nn.QuantizedLinear)
_PROBE_SIZE = 100.0
"""Largest raw logit of the probe: far into any soft-cap, so that none is missed."""
_USUAL_SOFTCAPS = (30.0, 15.0)
_FLAT = (32.0, 1e4)
"""How much larger than the probe's its logits are made to see where they end; the former fits float16."""
_SNAP = 0.01


def dense_weight(module: nn.Module) -> mx.array:
    """The matrix of an embedding or linear layer, [out, in], unpacked where it is quantized."""
    weight: mx.array = module["weight"]
    if "scales" not in module:
        return weight
    return mx.dequantize(
        weight,
        module["scales"],
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        global_scale=module.get("global_scale"),
    )


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """The head as a matrix. Reads its parameters when asked, so it follows training and gradient tracing.

    Attributes:
        module: the embedding or linear layer that holds the parameters.
        path: where it is in the model, "lm_head" or "model.embed_tokens".
        tied: whether it is also the input embedding.
        scale: logits are multiplied by it; None for 1.
        softcap: None for none.
    """

    module: nn.Module
    path: str
    tied: bool
    scale: float | None = None
    softcap: float | None = None

    @property
    def quantized(self) -> bool:
        """Whether `weight` is dequantized on each access (and cannot be trained)."""
        return "scales" in self.module

    @property
    def weight(self) -> mx.array:
        """[V, d]."""
        return dense_weight(self.module)

    @property
    def bias(self) -> mx.array | None:
        """[V], or None."""
        bias: mx.array | None = self.module.get("bias")
        return bias

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states [..., d] -> logits [..., V]."""
        return apply_scale(_raw(self.module, hidden), self.scale, self.softcap)


def apply_scale(raw: mx.array, scale: float | None, softcap: float | None) -> mx.array:
    """Raw products -> logits."""
    scaled = raw if scale is None else raw * scale
    return scaled if softcap is None else mx.tanh(scaled / softcap) * softcap


def find_linear_head(
    model: nn.Module,
    logits_of: Callable[[mx.array], mx.array],
    hidden: mx.array,
    *,
    config: dict[str, Any],
    roundoff: float,
) -> LinearHead | None:
    """Looks for the layer whose product, scaled and capped, is the model's head.

    Args:
        model: an mlx-lm model.
        logits_of: the exact head, hidden states [n, d] -> logits [n, V].
        hidden: states to try it on, [n, d].
        config: the model's; numbers in it are tried as scales and soft-caps.
        roundoff: largest relative error of one rounding in the type at hand.

    Returns:
        None if no layer fits.
    """
    vocab_size = logits_of(hidden).shape[-1]
    # Half-way, in the logarithm, from one rounding to a quarter of the largest logit: 1e-4 in float32, 0.03
    # in bfloat16. A product sums many roundings, and a wrong layer gives other logits altogether.
    tolerance = math.sqrt(roundoff / 4)
    for path, module in _candidates(model, vocab_size=vocab_size, hidden_size=hidden.shape[-1]):
        fit = _fit(module, logits_of, hidden, config=config, tolerance=tolerance)
        if fit is not None:
            scale, softcap = fit
            return LinearHead(module, path, isinstance(module, _EMBEDDINGS), scale, softcap)
    return None


def _candidates(model: nn.Module, *, vocab_size: int, hidden_size: int) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers first: an untied model has an embedding of the same shape."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if _shape(module) == (vocab_size, hidden_size)
    ]
    yield from sorted(found, key=lambda item: isinstance(item[1], _EMBEDDINGS))


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if not isinstance(module, _EMBEDDINGS + _LINEARS):
        return None
    rows, columns = module["weight"].shape
    return rows, columns * 32 // module.bits if "scales" in module else columns


def _raw(module: nn.Module, hidden: mx.array) -> mx.array:
    product: mx.array = module.as_linear(hidden) if isinstance(module, _EMBEDDINGS) else module(hidden)
    return product


def _fit(
    module: nn.Module,
    logits_of: Callable[[mx.array], mx.array],
    hidden: mx.array,
    *,
    config: dict[str, Any],
    tolerance: float,
) -> tuple[float | None, float | None] | None:
    """(scale, softcap) under which `module` gives the logits; None if there is none."""
    hidden = hidden * (_PROBE_SIZE / mx.abs(_raw(module, hidden)).max())
    raw, logits = (
        np.array(x.astype(mx.float32), np.float64) for x in (_raw(module, hidden), logits_of(hidden))
    )
    for softcap in (None, *_softcaps(config), *_fitted_softcap(logits_of, hidden, tolerance)):
        scale = _fit_scale(raw, logits, softcap, config)
        scaled = raw * (1.0 if scale is None else scale)
        expected = scaled if softcap is None else softcap * np.tanh(scaled / softcap)
        if np.abs(expected - logits).max() <= tolerance * np.abs(logits).max():
            return scale, softcap
    return None


def _fitted_softcap(
    logits_of: Callable[[mx.array], mx.array], hidden: mx.array, tolerance: float
) -> Iterator[float]:
    """The value at which the largest logit of every row ends; nothing where they do not end."""
    for factor in _FLAT:
        rows = mx.stack([mx.abs(logits_of(hidden * f)).max(axis=-1) for f in (factor, 2 * factor)])
        ends = np.array(rows.astype(mx.float32), np.float64)
        end = float(ends.max())
        if math.isfinite(end) and bool((np.abs(ends - end) <= tolerance * end).all()):
            yield _round(end, tolerance)
            return


def _round(value: float, tolerance: float) -> float:
    """The number of the fewest digits near it, since people choose such; itself if there is none."""
    for digits in range(1, 4):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= tolerance * value:
            return short
    return value


def _fit_scale(
    raw: np.ndarray, logits: np.ndarray, softcap: float | None, config: dict[str, Any]
) -> float | None:
    """Least squares, snapped to a number that the configuration gives."""
    if softcap is not None:
        inside = np.abs(logits) < 0.9 * softcap
        raw, logits = raw[inside], softcap * np.arctanh(logits[inside] / softcap)
    fitted = float((raw * logits).sum() / max(float((raw * raw).sum()), 1e-30))
    for known in (1.0, *_scales(config)):
        if abs(fitted - known) <= _SNAP * abs(known):
            return None if known == 1.0 else known
    return fitted


def _numbers(config: dict[str, Any], parts: Sequence[str]) -> Iterator[float]:
    """Positive numbers under keys that contain one of `parts`, nested configurations included."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value, parts)
        elif isinstance(value, int | float) and any(part in key for part in parts) and 0 < value < math.inf:
            yield float(value)


def _softcaps(config: dict[str, Any]) -> list[float]:
    return list(dict.fromkeys((*_numbers(config, ("softcap",)), *_USUAL_SOFTCAPS)))


def _scales(config: dict[str, Any]) -> list[float]:
    named = list(_numbers(config, ("logit", "scal", "mult")))
    width, base = config.get("hidden_size"), config.get("dim_model_base")
    if isinstance(width, int) and isinstance(base, int) and width:
        named.append(base / width)
    return [*named, *(1 / number for number in named)]
