"""Random heads, what the float64 reference says of them, and one call of the chunked head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from pmetal_distill.losses.chunked_head import Backend, HeadOptions, LossParts, head_loss
from pmetal_distill.losses.divergences import LOSS_NAMES
from pmetal_distill.losses.head import HeadParts
from tests import reference
from tests.pmetal_distill.loss_cases import KINDS, Case, smooth

BACKENDS: tuple[Backend, ...] = ("plain", "host")
WIDTH = 6
PAIRS = [(k, n) for k in KINDS for n in LOSS_NAMES if not (k == "none" and n == "reverse_kl")]


@dataclass(frozen=True)
class Head:
    """A random head: logits are `softcap tanh(scale (hidden W' + bias) / softcap)`."""

    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    scale: float | None
    softcap: float | None

    @staticmethod
    def random(case: Case, *, bias: bool, scale: float | None, softcap: float | None) -> "Head":
        """A head for the tokens and vocabulary of a case; its logits replace the case's student."""
        rng = np.random.default_rng(7)
        n, vocab = case.student.shape
        draw = [rng.standard_normal(s).astype(np.float32) for s in ((n, WIDTH), (vocab, WIDTH), (vocab,))]
        return Head(draw[0], draw[1] * 2, draw[2] if bias else None, scale, softcap)

    def parts(self, weight: mx.array, bias: mx.array | None) -> HeadParts:
        return HeadParts(weight, bias, self.scale, self.softcap)

    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits and their derivative by the products, float64."""
        raw = self.hidden.astype(np.float64) @ self.weight.T.astype(np.float64)
        raw = raw if self.bias is None else raw + self.bias
        scale = 1.0 if self.scale is None else self.scale
        if self.softcap is None:
            return raw * scale, np.full_like(raw, scale)
        capped = self.softcap * np.tanh(raw * scale / self.softcap)
        return capped, scale * (1 - (capped / self.softcap) ** 2)


def expected(case: Case, head: Head, alpha: float) -> tuple[float, float, float, list[np.ndarray]]:
    """Reference total, soft, hard, and gradients by hidden states, weight and bias."""
    logits, slope = head.logits()
    soft, soft_rows = case.soft(logits)
    labels = np.where(case.mask > 0, case.labels, -100)
    hard, hard_rows = reference.hard_loss_and_gradient(logits, labels)
    num_soft, num_hard = max(case.mask.sum(), 1e-9), max((labels != -100).sum(), 1e-9)
    t2 = case.temperature**2
    soft_mean, hard_mean = (soft * case.mask).sum() / num_soft, hard.sum() / num_hard
    rows = alpha * t2 * soft_rows * case.mask[:, None] / num_soft + (1 - alpha) * hard_rows / num_hard
    rows *= slope
    gradients = [rows @ head.weight, rows.T @ head.hidden, rows.sum(axis=0)]
    return alpha * t2 * soft_mean + (1 - alpha) * hard_mean, soft_mean, hard_mean, gradients


def run(
    case: Case,
    head: Head,
    *,
    alpha: float,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> tuple[LossParts, list[np.ndarray]]:
    """The real function and its gradients."""
    arrays = [mx.array(a) for a in (head.hidden, head.weight, head.bias) if a is not None]
    options = HeadOptions(backend=backend, chunk_tokens=chunk_tokens)

    def loss(hidden: mx.array, weight: mx.array, bias: mx.array | None = None) -> LossParts:
        return head_loss(
            hidden, head.parts(weight, bias), case.target.at(case.temperature), mx.array(case.labels),
            mx.array(case.mask), divergence=case.divergence, alpha=alpha, options=options,
        )  # fmt: skip

    step: Callable[..., Any] = mx.value_and_grad(loss, argnums=tuple(range(len(arrays))))
    parts, gradients = (mx.compile(step) if compiled else step)(*arrays)
    return LossParts(*parts), [np.array(g) for g in gradients]


def check(case: Case, head: Head, *, alpha: float, **settings: Any) -> None:
    """Values within 1e-5, gradients within 1e-5 of the largest."""
    parts, gradients = run(case, head, alpha=alpha, **settings)
    total, soft, hard, slopes = expected(case, head, alpha)
    for found, wanted in ((parts.total, total), (parts.soft, soft), (parts.hard, hard)):
        rounding = 1e-6 * (case.temperature**2 if found is parts.total else 1.0)
        np.testing.assert_allclose(found.item(), wanted, rtol=1e-5, atol=rounding + 1e-6)
    if smooth(case):
        for found, wanted in zip(gradients, slopes, strict=False):
            np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1.0, np.abs(wanted).max(), abs(total)))
