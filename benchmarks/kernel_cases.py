"""What `benchmarks/kernels.py` computes: random inputs, the losses ours and plain, and float64 references."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import pmetal_distill  # noqa: F401  (BLAS before MLX)

import mlx.core as mx  # isort: skip

from pmetal_distill.kernels import hidden_sums
from pmetal_distill.losses.chunk import PLAIN_OPS, Chunk, RowOps
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.target import SoftTarget

DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}
ALPHA, TEMPERATURE = 0.5, 2.0


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median over three runs of the time of one call, `repeats` calls in a row."""
    for _ in range(2):
        mx.eval(function())
    runs = []
    for _ in range(3):
        mx.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            mx.async_eval(function())
        mx.synchronize()
        runs.append((time.perf_counter() - start) / repeats)
    return statistics.median(runs)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most memory that one call needs beyond what exists before it, its results included."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function())
    mx.synchronize()
    return int(mx.get_peak_memory() - before)


def random_logits(rows: int, vocab: int, dtype: mx.Dtype, seed: int) -> mx.array:
    """Normal logits of standard deviation 3, made in slices: no float32 copy of all of them is needed."""
    mx.random.seed(seed)
    step = max(1, (1 << 28) // vocab)
    parts = []
    for start in range(0, rows, step):
        part = (mx.random.normal((min(step, rows - start), vocab)) * 3.0).astype(dtype)
        mx.eval(part)
        parts.append(part)
    logits = mx.concatenate(parts)
    mx.eval(logits)
    return logits


def bucket_target(rows: int, vocab: int, k: int) -> tuple[SoftTarget, mx.array]:
    """A target with 60 % of the mass in its head, and labels, half of them in the head.

    Ids are distinct: one in each k-th of the vocabulary.
    """
    rng = np.random.default_rng(0)
    width = vocab // k
    ids = (rng.integers(0, width, (rows, k)) + width * np.arange(k)).astype(np.int32)
    raw = rng.standard_normal((rows, k))
    logprobs = raw - np.log(np.exp(raw).sum(-1, keepdims=True)) + np.log(0.6)
    labels = rng.integers(0, vocab, rows).astype(np.int32)
    labels[::2] = ids[::2, 0]
    target = SoftTarget(
        "bucket",
        vocab,
        mx.array(1 / TEMPERATURE, mx.float32),
        head_ids=mx.array(ids),
        head_logprobs=mx.array(logprobs.astype(np.float32)),
        tail_logprobs=mx.full((rows,), float(np.log(0.4))),
    )
    return target, mx.array(labels)


def dense_target(teacher: mx.array) -> SoftTarget:
    """A live teacher's logits as the target."""
    inverse = mx.array(1 / TEMPERATURE, mx.float32)
    return SoftTarget("dense", teacher.shape[-1], inverse, source=teacher)


def loss_and_rows(
    logits: mx.array,
    target: SoftTarget,
    labels: mx.array,
    *,
    ops: RowOps = PLAIN_OPS,
    name: str = "forward_kl",
    alpha: float = ALPHA,
) -> tuple[mx.array, mx.array]:
    """alpha T^2 D + (1 - alpha) cross-entropy, mean over tokens, and its gradient by the logits."""
    chunk = Chunk.of(target, labels, Divergence(name), ops)
    n = logits.shape[0]
    s = chunk.statistics(logits)
    by_soft = mx.full((n,), alpha * TEMPERATURE**2 / n)
    by_hard = mx.full((n,), (1 - alpha) / n)
    total = (by_soft * chunk.soft(s) + by_hard * chunk.hard(s)).sum()
    return total, chunk.gradient(logits, s, soft=by_soft, hard=by_hard)


def written_plainly(logits: mx.array, target: SoftTarget, labels: mx.array) -> mx.array:
    """The bucket loss as one would first write it in MLX, with MLX's own derivatives."""
    assert target.head_ids is not None
    assert target.head_logprobs is not None
    assert target.tail_logprobs is not None
    z = logits.astype(mx.float32)
    scores = z / TEMPERATURE
    head = mx.take_along_axis(scores, target.head_ids, axis=-1)
    logq = head - mx.logsumexp(scores, axis=-1, keepdims=True)
    rest = mx.log(mx.maximum(1.0 - mx.exp(logq).sum(axis=-1), 1e-7))
    soft = (mx.exp(target.head_logprobs) * (target.head_logprobs - logq)).sum(axis=-1)
    soft = soft + mx.exp(target.tail_logprobs) * (target.tail_logprobs - rest)
    label = mx.take_along_axis(z, labels[:, None], axis=-1)[:, 0]
    hard = mx.logsumexp(z, axis=-1) - label
    return (ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard).mean()


def dense_plainly(logits: mx.array, teacher: mx.array) -> mx.array:
    """Dense forward KL as one would first write it."""
    lq, lp = logits.astype(mx.float32) / TEMPERATURE, teacher.astype(mx.float32) / TEMPERATURE
    lq = lq - mx.logsumexp(lq, axis=-1, keepdims=True)
    lp = lp - mx.logsumexp(lp, axis=-1, keepdims=True)
    return (mx.exp(lp) * (lp - lq)).sum(axis=-1).mean()


def hidden_loss(s: mx.array, t: mx.array) -> mx.array:
    """MSE plus one minus cosine, mean over tokens, on `hidden_sums`."""
    sums = hidden_sums(s, t)
    cosine = sums.dot * mx.rsqrt(sums.student) * mx.rsqrt(sums.teacher)
    return (sums.square / s.shape[-1] + 1.0 - cosine).mean()


def hidden_plainly(s: mx.array, t: mx.array) -> mx.array:
    """The same in ordinary operations."""
    a, b = s.astype(mx.float32), t.astype(mx.float32)
    cosine = (a * b).sum(-1) * mx.rsqrt((a * a).sum(-1)) * mx.rsqrt((b * b).sum(-1))
    return ((a - b).square().mean(-1) + 1.0 - cosine).mean()


def float64(array: mx.array) -> Any:
    """A NumPy copy in double precision."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def log_softmax(x: Any) -> Any:
    """Over the last axis, float64."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference_bucket(z: Any, target: SoftTarget, labels: mx.array, rows: list[int]) -> tuple[Any, Any]:
    """Float64 loss [rows] and its gradient for some rows of a bucket target."""
    ids, lp = np.array(target.head_ids)[rows], float64(target.head_logprobs)[rows]  # type: ignore[arg-type]
    lt, marked = float64(target.tail_logprobs)[rows], np.array(labels)[rows]  # type: ignore[arg-type]
    lq, l1 = log_softmax(z / TEMPERATURE), log_softmax(z)
    qi = np.exp(np.take_along_axis(lq, ids, -1))
    qt = 1 - qi.sum(-1)
    soft = (np.exp(lp) * (lp - np.log(qi))).sum(-1) + np.exp(lt) * (lt - np.log(qt))
    at_label = np.take_along_axis(l1, marked[:, None], -1)[:, 0]
    g = np.exp(lq) * (1 - np.exp(lt) / qt)[:, None]
    np.put_along_axis(g, ids, qi - np.exp(lp), -1)
    g1 = np.exp(l1)
    g1[np.arange(len(rows)), marked] -= 1
    value = ALPHA * TEMPERATURE**2 * soft - (1 - ALPHA) * at_label
    return value, ALPHA * TEMPERATURE * g + (1 - ALPHA) * g1


def reference_dense(x: Any, t: Any, name: str) -> tuple[Any, Any]:
    """Float64 divergence times T^2 [n] and its gradient [n, V]."""
    lq, lp = log_softmax(x / TEMPERATURE), log_softmax(t / TEMPERATURE)
    p, q = np.exp(lp), np.exp(lq)
    lm = np.log(0.5 * (p + q))
    value, slope = {
        "forward_kl": (p * (lp - lq), -p),
        "reverse_kl": (q * (lq - lp), q * (lq - lp + 1)),
        "jensen_shannon": (0.5 * (p * (lp - lm) + q * (lq - lm)), 0.5 * q * (lq - lm)),
        "total_variation": (0.5 * np.abs(p - q), 0.5 * q * np.sign(q - p)),
    }[name]
    gradient = slope - q * slope.sum(-1, keepdims=True)
    return TEMPERATURE**2 * value.sum(-1), TEMPERATURE * gradient
