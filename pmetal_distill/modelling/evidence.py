"""What rounding and leaks do to a model, measured on it, so that checks need no constants. Costs two passes.

Thirty layers in bfloat16 differ from themselves by a tenth when a product is summed in another order; four
layers in float32 by a millionth. So three things are measured in the outputs of the model at hand:

- leak: what a document changes in one that follows it and sees it;
- drift: what a document changes in one before it, which in a causal model is rounding;
- noise: what one rounding more after every block changes; where drift is rounding and larger, drift.

All are root mean squares of differences, over the spread of a row of logits. Of several rows the median
counts: real models have tokens at which an output tips over, so that the least rounding changes it wholly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from pmetal_distill.device import on_gpu
from pmetal_distill.modelling.stand_ins import Shaken, with_blocks

FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model raises that does not take a call."""
Caches = Callable[[], list[Any] | None]
"""Makes what a model is called with as `cache`, new for every call."""
_SHORT, _LONG = 4, 8
_GOLDEN = (math.sqrt(5) - 1) / 2
_FEW_TOKENS = 8
_MOST = 0.25
_LEAK_SHARE = 1 / 128


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Documents A, C and D of 4 tokens, B of 8, as rows A B, C B, B D.

    Attributes:
        alone: int32 [1, 8], document B.
        rows: int32 [3, 12].
        documents: int32 [3, 12], the number of each token's document.
    """

    alone: mx.array
    rows: mx.array
    documents: mx.array

    @classmethod
    def below(cls, vocab_size: int) -> Self:
        """Tokens spread over a vocabulary by the golden ratio, but for its ends, where special ones are."""
        margin = vocab_size // 16
        span = vocab_size - 2 * margin

        def tokens(start: int, count: int) -> list[int]:
            return [margin + int(span * (i * _GOLDEN % 1)) for i in range(start, start + count)]

        a, b, c, d = tokens(1, _SHORT), tokens(5, _LONG), tokens(16, _SHORT), tokens(21, _SHORT)
        last, first = [0] * _SHORT + [1] * _LONG, [0] * _LONG + [1] * _SHORT
        rows, layouts = [a + b, c + b, b + d], [last, last, first]
        return cls(*(mx.array(numbers, mx.int32) for numbers in ([b], rows, layouts)))


def vocabulary(config: dict[str, Any]) -> int:
    """The smallest vocabulary that a configuration names, nested ones included; 8 if it names none."""
    sizes = [value for key, value in config.items() if key == "vocab_size" and isinstance(value, int)]
    sizes += [vocabulary(value) for value in config.values() if isinstance(value, dict) and _names(value)]
    return max(min(sizes, default=_FEW_TOKENS), 1)


def _names(config: dict[str, Any]) -> bool:
    return "vocab_size" in config or any(_names(v) for v in config.values() if isinstance(v, dict))


@dataclass(frozen=True, slots=True)
class Packed:
    """What is left of a leak when documents are packed.

    Attributes:
        residual: difference of a packed document to the same one alone.
        leak: difference of a document after two different ones. Both calls have the same shapes and the same
            mask, so that where documents are apart not even roundings differ.
    """

    residual: float
    leak: float


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What was measured of a model without packing.

    Attributes:
        roundoff: largest relative error of one rounding in the coarsest type that it computes in.
        noise, leak, drift: see the module.
        alone: [8, V], logits of document B alone.
    """

    roundoff: float
    noise: float
    leak: float
    drift: float
    alone: mx.array

    @classmethod
    def of(cls, model: nn.Module, probe: Probe, logits: mx.array, caches: Caches = lambda: None) -> Self:
        """Two passes, called with `caches()`; `logits` [1, 8, V] are those of `probe.alone`."""
        alone, plain = logits.squeeze(0), model(probe.rows, cache=caches())
        roundoff = unit_roundoff(model, logits)
        leak = median(differences(plain[:2, _SHORT:], alone))
        drift = median(differences(plain[2, :_LONG], alone))
        # Roundings add up like a random walk.
        noise = roundoff * math.sqrt(len(model.layers))
        shaken = _shaken(model, probe.alone, roundoff, caches)
        if shaken is not None:
            noise = max(noise, median(differences(shaken.squeeze(0), alone)))
        found = cls(roundoff, noise, leak, drift, alone)
        return replace(found, noise=max(noise, drift)) if found.causal else found

    @property
    def largest_residual(self) -> float:
        """Below it a difference is rounding: half-way, in the logarithm, from noise to leak."""
        return max(math.sqrt(self.noise * self.leak), 2 * self.noise)

    @property
    def largest_leak(self) -> float:
        """Below it documents are apart: far from a leak, and no more than rounding if that is less."""
        return min(4 * self.noise, _LEAK_SHARE * self.leak)

    @property
    def causal(self) -> bool:
        """Whether no token changes an output before it."""
        return not self.drift > self.largest_residual

    @property
    def tolerance(self) -> float:
        """Of the same products in other shapes: noise, or half-way from one rounding to all there is."""
        return min(max(2 * self.noise, math.sqrt(self.roundoff)), _MOST)

    def packed(self, found: mx.array) -> Packed:
        """What is left in logits [3, 12, V] of the probe's rows, packed."""
        after = median(differences(found[:2, _SHORT:], self.alone))
        before = median(differences(found[2, :_LONG], self.alone))
        return Packed(
            residual=max(after, before),
            leak=root_mean_square(differences(found[1, _SHORT:], found[0, _SHORT:])),
        )

    def keeps_apart(self, packed: Packed) -> bool:
        """Whether that is no more than rounding leaves."""
        return packed.residual <= self.largest_residual and packed.leak <= self.largest_leak


def unit_roundoff(model: nn.Module, logits: mx.array) -> float:
    """Half the distance from 1 to the next number, in the coarsest type of a model's parameters and logits.

    On a GPU products of float32 count as TF32, whose numbers have 10 binary digits after the first.
    """
    sizes = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11, mx.float32: 2.0**-11 if on_gpu() else 2.0**-24}
    parameters: Any = tree_flatten(model.parameters())
    types = {logits.dtype, *(tensor.dtype for _, tensor in parameters)}
    return max((sizes[dtype] for dtype in types if dtype in sizes), default=sizes[mx.float32])


def _shaken(model: nn.Module, token_ids: mx.array, roundoff: float, caches: Caches) -> mx.array | None:
    """Logits with one rounding of the largest kind after every block; None where blocks do not bear it."""
    blocks = [Shaken(block, 2 * roundoff, seed) for seed, block in enumerate(model.layers)]
    copy = with_blocks(model, blocks)
    try:
        logits: mx.array | None = None if copy is None else copy(token_ids, cache=caches())
        mx.eval(logits)
    except FAILURES:
        return None
    return logits


def differences(found: mx.array, expected: mx.array) -> mx.array:
    """Of each row, the root mean square of the difference over the spread of `expected`: [..., n] -> [m]."""
    rows = expected.astype(mx.float32)
    wrong = mx.square(found.astype(mx.float32) - rows).sum(axis=-1)
    spread = mx.square(rows - rows.mean(axis=-1, keepdims=True)).sum(axis=-1)
    return mx.sqrt(wrong / mx.maximum(spread, 1e-30)).reshape(-1)


def median(rows: mx.array) -> float:
    """The middle one; NaN if any is."""
    ordered = mx.sort(rows)
    return math.nan if bool(mx.isnan(rows).any()) else cast(list[float], ordered.tolist())[len(rows) // 2]


def root_mean_square(rows: mx.array) -> float:
    """Each row counts for at most 1, which is another row altogether."""
    return float(mx.sqrt(mx.square(mx.minimum(rows, 1.0)).mean()))
