"""Loss and gradients from hidden states and the head's matrix, without the logits of all tokens.

Tokens pass in chunks: head product, row statistics, gradient rows, gradients of hidden states and head, next
chunk. Peak memory is a few chunks of logits and the head's gradient, whatever the number of tokens. Time is
three head products (two with a frozen head) and a few passes over the logits, as for full logits.

Two back ends: "plain" MLX ops (see `plain`), and "host" (see `host`), NumPy on the CPU, where MLX's `exp`
costs some twenty times NumPy's. "auto" takes the host where it can: CPU, not inside `mx.compile`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import mlx.core as mx

from pmetal_distill.device import on_cpu
from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses import host, plain
from pmetal_distill.losses.chunk import RowOps
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.losses.job import (
    HeadJob,
    StepResult,
    TokenRows,
    check_tokens,
    default_chunk_tokens,
    mask_labels,
)
from pmetal_distill.target import SoftTarget
from schemas.errors import IncompatibleError, UsageError

Backend = Literal["auto", "plain", "host"]


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How the chunked head computes; the result is the same within rounding.

    Attributes:
        chunk_tokens: tokens whose logits exist at once; chosen by vocabulary and device if None.
        backend: "plain", "host" or "auto".
        ops: row functions of the plain back end; kernels or plain operations, by device, if None.
    """

    chunk_tokens: int | None = None
    backend: Backend = "auto"
    ops: RowOps | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise UsageError(f"chunk_tokens must be at least 1, found {self.chunk_tokens}")
        if self.backend not in ("auto", "plain", "host"):
            raise UsageError(f"backend must be auto, plain or host, found '{self.backend}'")


class LossParts(NamedTuple):
    """A training loss and what it is made of. Scalars.

    Attributes:
        total: alpha T^2 soft + (1 - alpha) hard + hidden_weight hidden; the one to differentiate.
        soft: mean divergence over the tokens that count, nats.
        hard: mean cross-entropy over the tokens that count and have a label, nats.
        hidden: hidden-state loss, 0 without one.
        num_soft, num_hard: sums of the mask over those tokens.
    """

    total: mx.array
    soft: mx.array
    hard: mx.array
    hidden: mx.array
    num_soft: mx.array
    num_hard: mx.array

    def with_hidden(self, hidden: mx.array, weight: float) -> "LossParts":
        """The same with a hidden-state loss added."""
        return self._replace(total=self.total + weight * hidden, hidden=mx.stop_gradient(hidden))


def head_loss(
    hidden: mx.array,
    head: HeadParts,
    target: SoftTarget,
    labels: mx.array,
    mask: mx.array,
    *,
    divergence: Divergence | None = None,
    alpha: float | mx.array = 0.5,
    teacher_share: float | mx.array | None = None,
    counts: tuple[mx.array, mx.array] | None = None,
    options: HeadOptions | None = None,
) -> LossParts:
    """alpha T^2 D(teacher, student) + (1 - alpha) cross-entropy, means over tokens, differentiable.

    The gradients of the hidden states and the head's trained parameters are computed in this call. Where no
    gradient is wanted, `head_rows` costs a third.

    Args:
        hidden: the student's final hidden states [..., d].
        head: the student's head.
        target: the teacher at the wanted temperature, `TeacherTarget.at(T)`, of as many tokens.
        labels: next token of each position [...], -100 where there is none.
        mask: [...], how much each token counts, usually 0 or 1; also masks the labels.
        divergence: which one; forward KL if None.
        alpha: weight of the divergence, from 0 to 1.
        teacher_share: share of the teacher in a mixture with the student, for TAID (see `taid`); slow on the
            CPU, where only the plain back end mixes. None for the teacher alone.
        counts: divisors of the two sums, where a batch is processed in parts; the masks' sums if None.
        options: chunk size and back end.

    Returns:
        only `total` carries a gradient.

    Raises:
        UsageError: the divergence, or TAID, has no meaning for this kind of target; the host back end inside
            `mx.compile`.
        IncompatibleError: numbers of tokens differ.

    References:
        Hinton et al. 2015, arXiv:1503.02531, section 2, for the combination and the factor T^2.
    """
    options = options or HeadOptions()
    hidden, labels, mask = _flatten(hidden, labels, mask)
    check_tokens(hidden, target, labels, mask)
    labels = mask_labels(labels, mask)
    num_soft = mask.sum()
    num_hard = mx.where(labels == IGNORE_INDEX, 0.0, mask).sum()
    soft_count, hard_count = counts or (num_soft, num_hard)
    weight = mx.array(alpha, mx.float32) if isinstance(alpha, float | int) else alpha
    job = _job(head, target, labels, mask, divergence or Divergence(), options)
    if teacher_share is not None:
        _check_mixture(target, options)
        job = replace(job, teacher_share=teacher_share)
    job = job.with_factors(
        soft=weight / (mx.square(target.inv_temperature) * mx.maximum(soft_count, 1e-9)),
        hard=(1.0 - weight) / mx.maximum(hard_count, 1e-9),
    )
    total, soft, hard = _differentiable(hidden, job, options.backend)
    return LossParts(
        total,
        mx.stop_gradient(soft) / mx.maximum(soft_count, 1e-9),
        mx.stop_gradient(hard) / mx.maximum(hard_count, 1e-9),
        mx.zeros(()),
        num_soft,
        num_hard,
    )


def head_rows(
    hidden: mx.array,
    head: HeadParts,
    targets: Sequence[SoftTarget],
    labels: mx.array,
    mask: mx.array,
    *,
    divergence: Divergence | None = None,
    options: HeadOptions | None = None,
) -> TokenRows:
    """Losses and agreement of each token, for evaluation: no gradients, one head product.

    Args:
        hidden, head, labels, mask, divergence, options: as for `head_loss`.
        targets: the same teacher at one or more temperatures.

    Raises:
        UsageError, IncompatibleError: as `head_loss`.
    """
    options = options or HeadOptions()
    hidden, labels, mask = _flatten(hidden, labels, mask)
    labels = mask_labels(labels, mask)
    jobs = []
    for target in targets:
        check_tokens(hidden, target, labels, mask)
        jobs.append(_job(head, target, labels, mask, divergence or Divergence(), options))
    run = host.evaluate if choose_backend(hidden, options.backend) == "host" else plain.evaluate
    return run(hidden, jobs)


def choose_backend(hidden: mx.array, wanted: Backend) -> Literal["plain", "host"]:
    """The back end for these hidden states.

    Raises:
        UsageError: "host" was asked for inside `mx.compile`, or off the CPU.
    """
    if wanted == "plain" or (wanted == "auto" and os.environ.get("PMETAL_KERNELS") == "plain"):
        return "plain"
    possible = on_cpu() and host.can_evaluate(hidden)
    if wanted == "host" and not possible:
        raise UsageError("backend 'host' works on the CPU outside mx.compile only; use 'auto' or 'plain'")
    return "host" if possible else "plain"


def _differentiable(hidden: mx.array, job: HeadJob, backend: Backend) -> tuple[mx.array, mx.array, mx.array]:
    parameters = tuple(job.parts.parameters().values())

    @mx.custom_function
    def op(hidden: mx.array, *parameters: mx.array) -> tuple[mx.array, ...]:
        bound = job.with_parameters(parameters)
        mixed = bound.teacher_share is not None
        run = plain.step if mixed or choose_backend(hidden, backend) == "plain" else host.step
        result: StepResult = run(hidden, bound)
        soft, hard = (job.mask * result.soft).sum(), (job.mask * result.hard).sum()
        total = job.soft_factor * soft + job.hard_factor * hard
        return (total, soft, hard, result.hidden, *result.parameters)

    @op.vjp
    def op_vjp(
        primals: object, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...] | mx.array:
        gradients = tuple(
            (cotangents[0] * g).astype(p.dtype)
            for g, p in zip(outputs[3:], (hidden, *parameters), strict=True)
        )
        return gradients if len(gradients) > 1 else gradients[0]

    outputs = cast(tuple[mx.array, ...], op(hidden, *parameters))
    return outputs[0], outputs[1], outputs[2]


def _check_mixture(target: SoftTarget, options: HeadOptions) -> None:
    if not target.complete:
        raise UsageError(
            f"TAID needs the teacher's probability of every token, which tail '{target.kind}' does not give; "
            "use a cache with tail 'sketch', or a live teacher"
        )
    if options.backend == "host":
        raise UsageError("TAID runs on the plain back end only, found backend 'host'; use 'auto'")


def _job(
    head: HeadParts,
    target: SoftTarget,
    labels: mx.array,
    mask: mx.array,
    divergence: Divergence,
    options: HeadOptions,
) -> HeadJob:
    divergence.check(target.kind)
    if head.vocab_size < target.vocab_size:
        raise IncompatibleError(
            f"head_loss: the target must not name tokens that the student lacks; it has {target.vocab_size}, "
            f"the student {head.vocab_size}; restrict it with from_arrays(..., vocab_size=...)"
        )
    head = head.restricted(target.vocab_size)
    chunk_tokens = options.chunk_tokens or default_chunk_tokens(target.vocab_size)
    return HeadJob(head, target, labels, mask, divergence, chunk_tokens, options.ops)


def _flatten(hidden: mx.array, labels: mx.array, mask: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    return hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), mask.reshape(-1).astype(mx.float32)
