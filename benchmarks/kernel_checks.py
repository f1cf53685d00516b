"""The first section of `benchmarks/kernels.py`: every kernel against float64, on the device at hand."""

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import kernel_cases as cases
from pmetal_distill.kernels import backend, capture, engaged, ops, reset_engaged
from schemas.spec import DEFAULT_NODES

ROWS = 9
GRAIN = {"fp32": 2e-6, "fp16": 6e-4, "bf16": 5e-3}  # rounding of the gradient's type
Expect = Callable[..., None]


def relative(found: Any, wanted: Any) -> float:
    """Distance of two arrays over the size of the second."""
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def run(vocab: int, dtypes: Iterable[str], expect: Expect) -> list[str]:
    """Checks all kernels at two vocabularies (float16 at one).

    Args:
        vocab: the larger.
        dtypes: keys of `kernel_cases.DTYPES`.
        expect: called as expect(name, dtype, bound, **errors).

    Returns:
        what else is wrong.
    """
    reset_engaged()
    for dtype in dtypes:
        kind = cases.DTYPES[dtype]
        for size in (32001,) if dtype == "fp16" else (32001, vocab):
            z = cases.random_logits(ROWS, size, kind, seed=1)
            where = f"V={size}"
            _bucket(z, dtype, where, expect)
            _capture(z, dtype, where, expect)
            _dense(z, dtype, where, expect)
        _hidden(kind, dtype, expect)
    print("engaged:", engaged(), flush=True)
    return ["no kernel was engaged"] if backend() != "plain" and not engaged() else []


def _bucket(z: mx.array, dtype: str, where: str, expect: Expect) -> None:
    target, labels = cases.bucket_target(ROWS, z.shape[-1], 64)
    value, slope = cases.reference_bucket(cases.float64(z), target, labels, list(range(ROWS)))

    def step(x: mx.array) -> tuple[mx.array, mx.array]:
        return cases.loss_and_rows(x, target, labels, ops=ops)

    for name, function in (("loss", step), ("loss compiled", mx.compile(step))):
        v, g = function(z)
        errors = {"value": abs(v.item() / value.mean() - 1)}
        errors["gradient"] = relative(cases.float64(g), slope / ROWS)
        expect(f"{name} {where}", dtype, 4 * GRAIN[dtype], **errors)


def _capture(z: mx.array, dtype: str, where: str, expect: Expect) -> None:
    x = cases.float64(z)
    order = np.argsort(-x, axis=-1, kind="stable")
    lse = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    for k, nodes, name in ((64, DEFAULT_NODES, ""), (256, (0.13, 0.3, 0.51, 0.77, 1.0), " off grid")):
        got = capture(z, k=k, nodes=nodes)
        tail = np.take_along_axis(x, order[:, k:], -1) - np.take_along_axis(x, order[:, k - 1 : k], -1)
        curve = np.stack([np.log(np.exp(b * tail).sum(-1)) for b in nodes], -1)
        errors = {"ids": float((np.array(got.ids) != order[:, :k]).mean())}
        errors["lse"] = float(np.abs(np.array(got.lse) - lse).max())
        errors["curve"] = float(np.abs(np.array(got.curve) - curve).max())
        expect(f"capture k={k}{name} {where}", dtype, 5e-5, **errors)


def _dense(z: mx.array, dtype: str, where: str, expect: Expect) -> None:
    teacher = cases.random_logits(ROWS, z.shape[-1], mx.float32, seed=2)
    target, labels = cases.dense_target(teacher), mx.full((ROWS,), -100, mx.int32)
    names = ("forward_kl", "jensen_shannon", "reverse_kl", "total_variation")
    for name in names if dtype == "fp32" else names[:2]:
        value, slope = cases.reference_dense(cases.float64(z), cases.float64(teacher), name)
        # Times 512: float16 would round small entries to multiples of 6e-8.
        v, g = cases.loss_and_rows(z, target, labels, ops=ops, name=name, alpha=512.0 * ROWS)
        errors = {"value": abs(v.item() / (512.0 * value.sum()) - 1)}
        errors["gradient"] = relative(cases.float64(g), 512.0 * slope)
        expect(f"dense {name} {where}", dtype, 8 * GRAIN[dtype], **errors)


def _hidden(kind: mx.Dtype, dtype: str, expect: Expect) -> None:
    for width in (4096, 577):
        s, t = (cases.random_logits(33, width, kind, seed=seed) for seed in (3, 4))
        v, g = mx.value_and_grad(cases.hidden_loss)(s, t)
        a, b = cases.float64(s), cases.float64(t)
        na, nb = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
        cos = (a * b).sum(-1, keepdims=True) / (na * nb)
        value = ((a - b) ** 2).mean() + (1 - cos).mean()
        slope = 2 * (a - b) / a.size - (b / (na * nb) - cos * a / na**2) / len(a)
        errors = {"value": abs(v.item() / value - 1), "gradient": relative(cases.float64(g), slope)}
        expect(f"hidden MSE + cosine d={width}", dtype, 4 * GRAIN[dtype], **errors)
