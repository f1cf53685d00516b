"""Losses on logits: one value per token, differentiable. Memory: a few arrays of the size of the logits.

For training prefer `chunked_head.head_loss`, which never makes all tokens' logits. Leading axes are free:
student logits [..., V] and a target of as many tokens give [...].
"""

from typing import cast

import mlx.core as mx

from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses.chunk import Chunk
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.rows import DenseStatistics, SparseStatistics
from pmetal_distill.losses.shapes import Float, Integer
from pmetal_distill.reductions import row_logsumexp
from pmetal_distill.target import SoftTarget, TeacherTarget
from schemas.errors import IncompatibleError

Logits = Float[mx.array, "*tokens vocab"]
PerToken = Float[mx.array, "*tokens"]
Labels = Integer[mx.array, "*tokens"]


def divergence_loss(
    student_logits: Logits, target: TeacherTarget, *, divergence: Divergence, temperature: float
) -> PerToken:
    """Any of the soft losses at `temperature`, per token, in nats.

    Args:
        student_logits: unnormalised scores; reduced in float32.
        target: the teacher's distribution of the same tokens.
        divergence: which loss; see `Divergence` for formulas and sources.
        temperature: softmax temperature, > 0.

    Returns:
        one value per token; unmasked, unreduced, not scaled by temperature squared.

    Raises:
        UsageError: the temperature is not positive or outside the cache's tail curve, or the divergence has
            no meaning for this kind of target.
        IncompatibleError: other vocabulary or number of tokens than the target's.
    """
    divergence.check(target.kind)
    rows = student_logits.reshape(-1, student_logits.shape[-1])
    check_fit(rows, target.vocab_size, target.num_tokens)
    return _soft(rows, target.at(temperature), divergence).reshape(student_logits.shape[:-1])


def forward_kl(student_logits: Logits, target: TeacherTarget, *, temperature: float) -> PerToken:
    """KL(teacher || student) at `temperature`, per token, in nats, entropy term included.

    Args, Returns, Raises: as for `divergence_loss`.

    References:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    return divergence_loss(
        student_logits, target, divergence=Divergence("forward_kl"), temperature=temperature
    )


def reverse_kl(student_logits: Logits, target: TeacherTarget, *, temperature: float) -> PerToken:
    """KL(student || teacher) at `temperature`, per token, in nats; refused for a target of kind "none".

    Args, Returns, Raises: as for `divergence_loss`.

    References:
        Gu et al. 2024, MiniLLM, arXiv:2306.08543, section 2.
    """
    return divergence_loss(
        student_logits, target, divergence=Divergence("reverse_kl"), temperature=temperature
    )


def jensen_shannon(
    student_logits: Logits, target: TeacherTarget, *, temperature: float, beta: float = 0.5
) -> PerToken:
    """Generalized Jensen-Shannon divergence, per token, in nats.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, p the teacher, q the student.

    Args:
        student_logits, target, temperature: as for `divergence_loss`.
        beta: weight of the teacher, strictly between 0 and 1.

    Returns, Raises: as for `divergence_loss`.

    References:
        Agarwal et al. 2024, GKD, arXiv:2306.13649, section 3.
    """
    return divergence_loss(
        student_logits, target, divergence=Divergence("jensen_shannon", beta), temperature=temperature
    )


def soft_cross_entropy(student_logits: Logits, target: TeacherTarget, *, temperature: float) -> PerToken:
    """-sum p log q at `temperature`, per token, in nats: forward KL plus the teacher's entropy.

    Args, Returns, Raises: as for `divergence_loss`.
    """
    return divergence_loss(
        student_logits, target, divergence=Divergence("soft_cross_entropy"), temperature=temperature
    )


def total_variation(student_logits: Logits, target: TeacherTarget, *, temperature: float) -> PerToken:
    """Half the sum of |p - q| at `temperature`, per token, from 0 to 1.

    Args, Returns, Raises: as for `divergence_loss`.
    """
    return divergence_loss(
        student_logits, target, divergence=Divergence("total_variation"), temperature=temperature
    )


def skewed_kl(
    student_logits: Logits,
    target: TeacherTarget,
    *,
    temperature: float,
    skew: float = 0.1,
    reverse: bool = False,
) -> PerToken:
    """KL(p || skew p + (1 - skew) q), or with `reverse` KL(q || skew q + (1 - skew) p), per token, in nats.

    Args:
        student_logits, target, temperature: as for `divergence_loss`.
        skew: strictly between 0 and 1.
        reverse: swap teacher p and student q.

    Returns, Raises: as for `divergence_loss`.

    References:
        Ko et al. 2024, DistiLLM, arXiv:2402.03898, section 3.1.
    """
    name = "skewed_reverse_kl" if reverse else "skewed_forward_kl"
    return divergence_loss(student_logits, target, divergence=Divergence(name, skew), temperature=temperature)


def hard_cross_entropy(
    student_logits: Logits, labels: Labels, *, ignore_index: int = IGNORE_INDEX
) -> PerToken:
    """-log q(label) at T=1, per token, in nats; 0 where the label is `ignore_index`.

    Args:
        student_logits: unnormalised scores; reduced in float32.
        labels: the next token of each position.
        ignore_index: label of positions without a next token.

    Returns:
        one value per token, unreduced.
    """
    scores = student_logits.astype(mx.float32)
    valid = labels != ignore_index
    safe = mx.where(valid, labels, 0)[..., None]
    scores = scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True))
    picked = mx.take_along_axis(scores, safe, axis=-1)[..., 0]
    return mx.where(valid, row_logsumexp(scores) - picked, 0.0)


def check_fit(rows: mx.array, vocab_size: int, num_tokens: int) -> None:
    """Refuses logits [n, V] that are not those of a target's tokens.

    Raises:
        IncompatibleError: another V or n.
    """
    if rows.shape != (num_tokens, vocab_size):
        raise IncompatibleError(
            f"student logits must be (tokens, vocabulary) = ({num_tokens}, {vocab_size}) as the target's, "
            f"found {tuple(rows.shape)}; slice padded vocabularies to the columns both have"
        )


def _soft(logits: mx.array, target: SoftTarget, divergence: Divergence) -> mx.array:
    labels = mx.full((logits.shape[0],), IGNORE_INDEX, mx.int32)
    chunk = Chunk.of(target, labels, divergence)
    family = DenseStatistics if target.complete else SparseStatistics

    @mx.custom_function
    def op(rows: mx.array) -> tuple[mx.array, ...]:
        statistics = chunk.statistics(rows)
        return (chunk.soft(statistics), *statistics)

    @op.vjp
    def op_vjp(rows: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
        weight = cotangents[0]
        gradient = chunk.gradient(rows, family(*outputs[1:]), soft=weight, hard=mx.zeros_like(weight))
        return gradient.astype(rows.dtype)

    return cast(tuple[mx.array, ...], op(logits))[0]
