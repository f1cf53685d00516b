"""The crate's losses under its names: objects to call on logits, and what `DistillConfig(loss=...)` takes.

    loss = JensenShannonLoss(beta=0.3)
    value = loss(student(token_ids), teacher(token_ids), temperature=2.0)

They need all logits of both at once, a few arrays of their size. A `Distiller` with the same loss computes
the same number a chunk of tokens at a time.
"""

from dataclasses import dataclass

import mlx.core as mx

from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.functional import divergence_loss, hard_cross_entropy
from pmetal_distill.losses.job import mask_labels
from pmetal_distill.target import TeacherTarget, check_temperature
from schemas.errors import IncompatibleError, UsageError


class NamedLoss:
    """A loss on logits: alpha T^2 divergence + (1 - alpha) cross-entropy, means over tokens."""

    __slots__ = ()

    @property
    def divergence(self) -> Divergence:
        """The divergence between teacher and student."""
        raise NotImplementedError

    def __call__(
        self,
        student_logits: mx.array,
        teacher: TeacherTarget | mx.array,
        *,
        temperature: float = 2.0,
        mask: mx.array | None = None,
        labels: mx.array | None = None,
        alpha: float | None = None,
    ) -> mx.array:
        """The loss as one number to differentiate; the teacher gets no gradient.

        Args:
            student_logits: unnormalised scores [..., V]; reduced in float32.
            teacher: logits [..., V] of the same tokens, or their target out of a cache.
            temperature: softmax temperature of both, > 0. The divergence is multiplied by its square.
            mask: [...], how much each token counts, usually 0 or 1; all alike if None. Masks the labels too.
            labels: next token of each position [...], -100 where there is none; no cross-entropy if None.
            alpha: weight of the divergence, from 0 to 1; if None 0.5 with labels and 1 without.

        Returns:
            a scalar; 0 where no token counts.

        Raises:
            UsageError: alpha out of range or below 1 without labels, or what `divergence_loss` refuses.
            IncompatibleError: shapes that do not fit together.

        References:
            Hinton et al. 2015, arXiv:1503.02531, section 2, for the combination and the factor T^2.
        """
        weight = _check_alpha(alpha, labels)
        scale = weight * check_temperature(temperature) ** 2
        shape = student_logits.shape[:-1]
        mask = mx.ones(shape) if mask is None else _of_shape("mask", mask, shape).astype(mx.float32)
        # Logits of tokens that do not count become 0, so that a NaN in the padding reaches nothing.
        counts = (mask > 0)[..., None]
        logits = mx.where(counts, student_logits, 0.0).astype(student_logits.dtype)
        target = teacher if isinstance(teacher, TeacherTarget) else _dense(teacher, student_logits, counts)
        soft = divergence_loss(logits, target, divergence=self.divergence, temperature=temperature)
        total = scale * _mean(soft, mask)
        if labels is None:
            return total
        labels = mask_labels(_of_shape("labels", labels, shape), mask)
        labelled = mx.where(labels == IGNORE_INDEX, 0.0, mask)
        return total + (1 - weight) * _mean(hard_cross_entropy(logits, labels), labelled)


@dataclass(frozen=True, slots=True)
class KLDivergenceLoss(NamedLoss):
    """KL(teacher || student), or with `reverse` KL(student || teacher).

    Attributes:
        reverse: swap teacher and student.

    References:
        Hinton et al. 2015, arXiv:1503.02531, section 2; reversed: Gu et al. 2024, MiniLLM, arXiv:2306.08543.
    """

    reverse: bool = False

    @property
    def divergence(self) -> Divergence:
        """`forward_kl` or `reverse_kl`."""
        return Divergence("reverse_kl" if self.reverse else "forward_kl")


@dataclass(frozen=True, slots=True)
class JensenShannonLoss(NamedLoss):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, p the teacher, q the student.

    Attributes:
        beta: weight of the teacher, strictly between 0 and 1.

    Raises:
        UsageError: beta out of range.

    References:
        Agarwal et al. 2024, GKD, arXiv:2306.13649, section 3.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        _ = self.divergence

    @property
    def divergence(self) -> Divergence:
        """`jensen_shannon` with beta."""
        return Divergence("jensen_shannon", self.beta)


@dataclass(frozen=True, slots=True)
class SoftCrossEntropyLoss(NamedLoss):
    """-sum p log q: forward KL plus the teacher's entropy. Trains like forward KL; not 0 at its best."""

    @property
    def divergence(self) -> Divergence:
        """`soft_cross_entropy`."""
        return Divergence("soft_cross_entropy")


def _check_alpha(alpha: float | None, labels: mx.array | None) -> float:
    if alpha is None:
        return 1.0 if labels is None else 0.5
    if not 0 <= alpha <= 1:
        raise UsageError(f"loss: alpha must be from 0 to 1, found {alpha}")
    if labels is None and alpha < 1:
        raise UsageError(
            f"loss: alpha = {alpha} gives the cross-entropy a weight of {1 - alpha:g}, which needs labels; "
            "pass labels=, the next token of each position, or leave alpha out"
        )
    return float(alpha)


def _dense(teacher: mx.array, student_logits: mx.array, counts: mx.array) -> TeacherTarget:
    if teacher.shape != student_logits.shape:
        raise IncompatibleError(
            f"loss: teacher logits must have the student's shape {tuple(student_logits.shape)}, found "
            f"{tuple(teacher.shape)}; slice padded vocabularies to the columns both have"
        )
    return TeacherTarget.dense(mx.where(counts, teacher, 0.0).astype(teacher.dtype))


def _of_shape(name: str, array: mx.array, shape: tuple[int, ...]) -> mx.array:
    if array.shape != shape:
        raise IncompatibleError(
            f"loss: {name} must have one entry for each position of the student's logits, {tuple(shape)}, "
            f"found {tuple(array.shape)}"
        )
    return array


def _mean(values: mx.array, weights: mx.array) -> mx.array:
    return (weights * values).sum() / mx.maximum(weights.sum(), 1e-9)
