"""What the chunked head is asked to do, in the form both of its back ends take. A few [tokens] arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from pmetal_distill.device import on_cpu
from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses.chunk import RowOps
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.target import SoftTarget
from schemas.errors import IncompatibleError

_LOGITS_BYTES = 1 << 26
_LOGITS_BYTES_GPU = 1 << 29
_LEAST_TOKENS = 128


@dataclass(frozen=True, slots=True, eq=False)
class HeadJob:
    """Tokens, the head, and how much each token counts.

    Attributes:
        parts: the head.
        target: the teacher at a temperature, N tokens.
        labels: int32 [N], `IGNORE_INDEX` where there is none or where it does not count.
        mask: float32 [N], how much each token counts; 0 for not at all.
        divergence: between teacher and student.
        chunk_tokens: tokens whose logits exist at once.
        ops: row functions of the plain back end; the device's if None.
        teacher_share: below 1, the teacher is mixed with the student (see `taid`); None for the teacher
            alone.
        soft_factor, hard_factor: scalars; the total is the sum over tokens of
            mask * (soft_factor * divergence + hard_factor * cross-entropy).
    """

    parts: HeadParts
    target: SoftTarget
    labels: mx.array
    mask: mx.array
    divergence: Divergence
    chunk_tokens: int
    ops: RowOps | None = None
    teacher_share: float | mx.array | None = None
    soft_factor: mx.array | float = 0.0
    hard_factor: mx.array | float = 0.0

    def with_factors(self, *, soft: mx.array, hard: mx.array) -> "HeadJob":
        """The same job with the factors of the total."""
        return replace(self, soft_factor=soft, hard_factor=hard)

    def with_parameters(self, values: Sequence[mx.array]) -> "HeadJob":
        """The same job with other values of the head's trained parameters."""
        changes: dict[str, Any] = dict(zip(self.parts.parameters(), values, strict=True))
        return replace(self, parts=replace(self.parts, **changes))


class StepResult(NamedTuple):
    """What a pass with gradients gives.

    Attributes:
        soft, hard: [N], losses per token; 0 where the mask is 0 or the label is missing.
        hidden: [N, d], gradient of the weighted sum by the hidden states.
        parameters: gradients of `HeadParts.parameters()`, in its order.
    """

    soft: mx.array
    hard: mx.array
    hidden: mx.array
    parameters: list[mx.array]


class TokenRows(NamedTuple):
    """What a pass without gradients says about each token; 0 where the mask is 0. All float32.

    Attributes:
        soft: [temperatures, N], divergence at each temperature, nats.
        hard: [N], cross-entropy with the label at T=1, nats; 0 where there is none.
        confidence: [N], the student's largest probability at T=1.
        teacher_rank: [N], tokens that the student puts above the teacher's first: 0 is top-1 agreement.
        label_rank: [N], tokens that the student puts above the label: 0 is a right prediction.
    """

    soft: mx.array
    hard: mx.array
    confidence: mx.array
    teacher_rank: mx.array
    label_rank: mx.array


def default_chunk_tokens(vocab_size: int) -> int:
    """Tokens per chunk, at least 128: 64 MiB of float32 logits on the CPU, 512 MiB on a GPU.

    Each chunk reads and writes the head's whole gradient, so small chunks of a large vocabulary are slow.
    With twice as many tokens a step on an H100 took 4 % less time and 1.6 GB more memory.
    """
    size = _LOGITS_BYTES if on_cpu() else _LOGITS_BYTES_GPU
    tokens = size // (4 * vocab_size)
    return max(_LEAST_TOKENS, tokens - tokens % 64)


def check_tokens(hidden: mx.array, target: SoftTarget, labels: mx.array, mask: mx.array) -> None:
    """Refuses inputs of different numbers of tokens.

    Raises:
        IncompatibleError: with all four numbers.
    """
    counts = (hidden.shape[0], target.num_tokens, labels.shape[0], mask.shape[0])
    if len(set(counts)) != 1:
        raise IncompatibleError(
            f"head_loss: hidden states, target, labels and mask must have as many tokens each, found {counts}"
        )


def mask_labels(labels: mx.array, mask: mx.array) -> mx.array:
    """Labels with `IGNORE_INDEX` where the mask is 0."""
    return mx.where(mask > 0, labels.astype(mx.int32), IGNORE_INDEX)
