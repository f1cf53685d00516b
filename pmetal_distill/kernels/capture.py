"""Capture: the head, the log-sum-exp and the tail curve of teacher logits in about one read of [tokens, V].

With plain operations it costs a sort of [tokens, V] and a pass a node.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from pmetal_distill.kernels import dispatch, tuning
from pmetal_distill.kernels.row import usable
from pmetal_distill.reductions import row_logsumexp

MAX_K, MAX_NODES, LISTED, SAMPLE = 256, 8, 2048, 8
GRIDS = (1, 2, 4, 8, 16, 32, 64)
SIGNIFICANT_BIT = {
    mx.float32: 0,
    mx.float16: 13,
    mx.bfloat16: 16,
}  # lowest bit of a score's float32 key that varies
FLOOR_BIT = 12


class Captured(NamedTuple):
    """What `capture` returns.

    Attributes:
        ids: int32 [n, k], columns of the k largest logits in descending order, ties by lower id.
        scores: float32 [n, k], their logits.
        lse: float32 [n], ln sum exp of the row; NaN or infinite if the row holds NaN or +infinity.
        lowest: float32 [n], the row's smallest logit, NaN aside. -infinity shows here only, not in `lse`.
        curve: float32 [n, m], ln sum over the tail of exp(b (z_j - z_ref)) at each node b, z_ref the smallest
            head logit. Where the sum underflows float32, its largest term.
    """

    ids: mx.array
    scores: mx.array
    lse: mx.array
    lowest: mx.array
    curve: mx.array


def capture(logits: mx.array, *, k: int, nodes: Sequence[float] = ()) -> Captured:
    """Top k, log-sum-exp and tail sums of logits [n, V]. Not differentiable.

    Args:
        logits: float32, float16 or bfloat16.
        k: entries of the head, 1 to V.
        nodes: values of b = 1/T. Multiples of 1/64 up to 1 cost one exponential an element for all of them.
    """
    wanted = tuple(nodes)
    whole = wanted if 1.0 in wanted else (*wanted, 1.0)
    if usable(logits, k) and k <= MAX_K and len(whole) <= MAX_NODES:
        ids, scores, lse, lowest, curve = _launch(logits, k, whole)
        return Captured(ids, scores, lse, lowest, curve[:, : len(wanted)])
    return _plain(logits, k, wanted)


def grid_of(nodes: Sequence[float]) -> tuple[int, tuple[int, ...]]:
    """The smallest grid g with every node a multiple of 1/g up to 1, and the multiples; (0, ()) if none."""
    for grid in GRIDS:
        powers = tuple(round(b * grid) for b in nodes)
        if all(0 < p <= grid and p / grid == b for p, b in zip(powers, nodes, strict=True)):
            return grid, powers
    return 0, ()


def _shape(logits: mx.array, k: int) -> tuple[tuning.Shape, int]:
    length, width = logits.shape[-1], tuning.vector_width(logits.dtype)
    shape = tuning.shape_for("capture", dispatch.platform_name(), length=length, width=width)
    return shape, max(1, min(SAMPLE, length // (2 * width * shape.threads)))


def rank_of(k: int, sample: int) -> int:
    """Which of the sampled scores, by size, lies below the k-th of all in all but 1 of about 10,000 rows."""
    return min(k, math.ceil(k / sample + 4.0 * math.sqrt(k / sample * (1 - 1 / sample))))


def _launch(logits: mx.array, k: int, nodes: tuple[float, ...]) -> list[mx.array]:
    n, length = logits.shape
    grid, powers = grid_of(nodes)
    shape, sample = _shape(logits, k)
    values: dict[str, Any] = {"T": logits.dtype, "V": length, "K": k, "W": tuning.vector_width(logits.dtype)}
    values |= {"U": shape.unroll, "HINT": shape.hint, "TG": shape.threads, "SAMPLE": sample, "CAP": LISTED}
    values |= {"RANK": rank_of(k, sample)}
    values |= {"FLOOR_BIT": FLOOR_BIT, "KEY_BIT": SIGNIFICANT_BIT[logits.dtype]}
    values |= {"NODES": len(nodes), "ONE": nodes.index(1.0), "GRID": grid}
    values |= {f"P{i}": powers[i] if i < len(powers) else 0 for i in range(MAX_NODES)}
    outputs: dispatch.Outputs = {"ids": ((n, k), mx.int32), "scores": ((n, k), mx.float32)}
    outputs |= {"lse": ((n,), mx.float32), "lowest": ((n,), mx.float32)}
    outputs |= {"curve": ((n, len(nodes)), mx.float32)}
    rates = dispatch.constants(*nodes, *[0.0] * (MAX_NODES - len(nodes)))
    inputs = {"z": logits, "rates": rates}
    return dispatch.launch(
        "capture", inputs, outputs, template=list(values.items()), groups=n, threads=shape.threads
    )


def _plain(logits: mx.array, k: int, nodes: tuple[float, ...]) -> Captured:
    z = logits.astype(mx.float32)
    ids = _top(z, k)
    scores = mx.take_along_axis(z, ids, axis=-1)
    tail = mx.put_along_axis(z, ids, mx.array(-1.0e30), axis=-1) - scores[:, -1:]
    rows = [row_logsumexp(b * tail) for b in nodes]
    curve = mx.stack(rows, axis=-1) if rows else mx.zeros((len(z), 0))
    return Captured(ids, scores, row_logsumexp(z), z.min(axis=-1), curve)


def _top(z: mx.array, k: int) -> mx.array:
    """Ids of the k largest of each row, descending, ties by lower id; two selections instead of a sort."""
    smallest = mx.topk(z, k, axis=-1).min(axis=-1, keepdims=True)
    above, equal = z > smallest, z == smallest
    room = k - above.sum(axis=-1, keepdims=True)
    chosen = above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= room))
    ids = mx.argpartition(chosen, -k, axis=-1)[:, -k:].astype(mx.int32)
    scores = mx.take_along_axis(z, ids, axis=-1)
    return mx.take_along_axis(ids, mx.argsort(_descending_key(scores, ids), axis=-1), axis=-1)


def _descending_key(scores: mx.array, ids: mx.array) -> mx.array:
    """int64 that sorts by descending score, then ascending id."""
    bits = mx.where(scores == 0, 0.0, scores).view(mx.uint32).astype(mx.int64)
    ordered = mx.where(bits >= 1 << 31, (1 << 32) - 1 - bits, bits + (1 << 31))
    return ((1 << 32) - 1 - ordered) * (1 << 24) + ids.astype(mx.int64)
