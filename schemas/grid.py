"""Rounding of log-probabilities and curve values to their grids. Errors never add up along a row.

The largest head entry is the origin: step counts `d[i] = round((u[0] - u[i]) / logprob_step)` are absolute,
and only their differences are stored. They saturate at 65535 (512 nats below the top at the default step).
Curve values are relative to the decoded z_ref and saturate at +-32767 steps (128 nats at the default).
"""

import numpy as np
import numpy.typing as npt

from schemas.arrays import Float32, Int32, TargetArrays
from schemas.spec import TargetSpec

MAX_STEPS = 65535
MAX_CURVE = 32767
TOP_STEP = 1 / 2048


def quantize_logprobs(head_logprobs: Float32, spec: TargetSpec) -> tuple[Int32, int]:
    """Steps below the top, int32 [n, k], and how many of them saturated."""
    below = head_logprobs[:, :1].astype(np.float64) - head_logprobs
    steps = np.rint(below / spec.logprob_step)
    saturated = int((steps > MAX_STEPS).sum())
    return np.clip(steps, 0, MAX_STEPS).astype(np.int32), saturated


def quantize_curve(targets: TargetArrays, steps: Int32, spec: TargetSpec) -> tuple[Int32, int]:
    """Curve relative to the decoded z_ref, int32 [n, m], and how many values saturated.

    The given curve is relative to the exact smallest head logit; the decoded one lies
    `(z_ref - z_top) + steps[k-1] * logprob_step` off, which tilts A(b) by b times that.
    """
    head = targets.head_logprobs.astype(np.float64)
    shift = head[:, -1:] - head[:, :1] + steps[:, -1:] * spec.logprob_step
    curve = targets.tail_curve + shift * np.array(spec.curve_nodes)
    values = np.rint(curve / spec.curve_step)
    saturated = int((np.abs(values) > MAX_CURVE).sum())
    return np.clip(values, -MAX_CURVE, MAX_CURVE).astype(np.int32), saturated


def top_logprob(relative: Float32, curve_at_one: Float32) -> Float32:
    """log p of the top entry from the distribution summing to one.

    Args:
        relative: [n, k], head log-probabilities minus the top one.
        curve_at_one: [n], A(1).

    Returns:
        float32 [n]: -log(sum_i exp(relative_i) + exp(relative_k + A(1))).
    """
    tail = np.exp(relative[:, -1] + curve_at_one)
    return np.asarray(-np.log(np.exp(relative).sum(axis=1) + tail), np.float32)


def truncate_head(targets: TargetArrays, spec: TargetSpec, k: int) -> TargetArrays:
    """The same targets with a smaller head: the dropped entries join the tail.

    A'(b) = log(sum_dropped exp(b (z_j - z_ref')) + exp(A(b) + b (z_ref - z_ref'))) at the stored nodes.
    """
    if k == targets.k:
        return targets
    head = targets.head_logprobs
    dropped = head[..., k:] - head[..., k - 1 : k]
    curve = np.empty_like(targets.tail_curve)
    for i, b in enumerate(spec.curve_nodes):
        terms = np.float32(b) * dropped
        tail = targets.tail_curve[..., i] + terms[..., -1]
        largest = np.maximum(terms[..., 0], tail)
        total = np.exp(terms - largest[..., None]).sum(axis=-1) + np.exp(tail - largest)
        curve[..., i] = np.log(total) + largest
    return TargetArrays(targets.head_ids[..., :k], head[..., :k], curve, targets.coordinates)


def masked_zero(values: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.bool_]) -> Int32:
    """`values` [n, width] with the rows that are not trained set to zero."""
    return values if loss_mask.all() else np.where(loss_mask[:, None], values, np.int32(0))
