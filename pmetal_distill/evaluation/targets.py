"""A student against the targets of a teacher, token by token, without gradients.

Works with whatever a teacher gives, cached or live. Costs the student's forward pass, and for every question
a head product and a pass over the logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from pmetal_distill.host_inputs import to_device
from pmetal_distill.losses.chunked_head import HeadOptions, head_rows
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.job import TokenRows
from pmetal_distill.models import LoadedModel
from pmetal_distill.teaching import Teacher, TrainingBatch


@dataclass(frozen=True, slots=True)
class Question:
    """A divergence at a softmax temperature."""

    divergence: Divergence
    temperature: float


def target_rows(
    student: LoadedModel,
    teacher: Teacher,
    batch: TrainingBatch,
    questions: Sequence[Question],
    *,
    chunk_tokens: int | None = None,
) -> TokenRows:
    """What is known of each of the B L tokens of a batch.

    Args:
        student: in the mode it is in; call `student.model.eval()` before.
        teacher: cached or live.
        batch: that the teacher can answer.
        questions: at least one.
        chunk_tokens: tokens whose logits exist at once; by vocabulary and device if None.

    Returns:
        evaluated; `soft` has one row a question, in their order.

    Raises:
        UsageError: a divergence or temperature that the targets do not give.
        IncompatibleError: the batch does not fit the teacher.
    """
    target, _ = teacher.answer(batch, ())
    states, head = student.scored(to_device(batch.token_ids), documents=batch.documents)
    hidden, options = states.final, HeadOptions(chunk_tokens=chunk_tokens)
    labels, mask = to_device(batch.labels), to_device(batch.loss_mask)
    soft: dict[Question, mx.array] = {}
    rows: TokenRows | None = None
    for divergence, asked in _by_divergence(questions).items():
        targets = [target.at(question.temperature) for question in asked]
        found = head_rows(hidden, head, targets, labels, mask, divergence=divergence, options=options)
        soft.update(zip(asked, found.soft, strict=True))
        rows = rows or found
    assert rows is not None
    rows = rows._replace(soft=mx.stack([soft[question] for question in questions]))
    mx.eval(rows)
    return rows


def _by_divergence(questions: Sequence[Question]) -> dict[Divergence, list[Question]]:
    """Distinct questions, those together that one pass over the logits answers."""
    groups: dict[Divergence, list[Question]] = {}
    for question in dict.fromkeys(questions):
        groups.setdefault(question.divergence, []).append(question)
    return groups
