"""The kernels' helpers in plain MLX operations: the fallback, and what the kernels are compared with."""

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
LOWEST = -1.0e30  # stands for minus infinity


def logsumexp(scores: mx.array) -> mx.array:
    """ln sum exp over the last axis, float32; LOWEST where every entry is LOWEST (or there is none)."""
    if scores.shape[-1] == 0:
        return mx.full(scores.shape[:-1], LOWEST)
    return mx.maximum(mx.logsumexp(scores, axis=-1), LOWEST)


def without_head(logits: mx.array, ids: mx.array) -> mx.array:
    """float32 copy of [n, V] with LOWEST at the ids."""
    z = logits.astype(mx.float32)
    if ids.shape[-1] == 0:
        return z
    return mx.put_along_axis(z, ids, mx.array(LOWEST, mx.float32), axis=-1)


def gather(logits: mx.array, ids: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """Logits at the ids [n, k] and at the labels [n] (0 where negative), float32."""
    head = mx.take_along_axis(logits, ids, axis=-1).astype(mx.float32)
    at_label = mx.take_along_axis(logits, mx.maximum(labels, 0)[:, None], axis=-1)[:, 0].astype(mx.float32)
    return head, mx.where(labels < 0, 0.0, at_label)


def with_head(
    slope: mx.array, ids: mx.array, labels: mx.array, d_head: mx.array, d_label: mx.array
) -> mx.array:
    """A tail gradient [n, V] with the head's entries replaced and the label's added to."""
    if ids.shape[-1]:
        slope = mx.put_along_axis(slope, ids, d_head, axis=-1)
    columns = mx.maximum(labels, 0)[:, None]
    added = mx.take_along_axis(slope, columns, axis=-1) + mx.where(labels < 0, 0.0, d_label)[:, None]
    return mx.put_along_axis(slope, columns, added, axis=-1)
