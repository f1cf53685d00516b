"""How close a student is to a live teacher on text it has not seen. Costs a forward pass of both models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.batching import TokenBatch, token_batches
from pipeline.console import Console
from pipeline.data import PackedDataset
from schemas.errors import IncompatibleError

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel

DEFAULT_TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        temperatures: where KL(teacher || student) is taken.
        batch_size: sequences at a time.
        head_chunk: rows of logits alive at once.
        max_tokens: stop behind so many tokens; None takes all.
    """

    temperatures: Sequence[float] = DEFAULT_TEMPERATURES
    batch_size: int = 8
    head_chunk: int = 256
    max_tokens: int | None = None


def check_same_tokenizer(teacher: "LoadedModel", student: "LoadedModel") -> None:
    """Refuses a pair of models that number tokens differently.

    Raises:
        IncompatibleError: with the first differences.
    """
    from pmetal_distill.models import compare_tokenizers

    if differences := compare_tokenizers(teacher.tokenizer, student.tokenizer):
        raise IncompatibleError(
            f"{student.source}: must have the tokenizer of {teacher.source}, found differences: "
            f"{'; '.join(differences[:5])}; take a student of the same family"
        )


def evaluate(
    teacher: "LoadedModel",
    student: "LoadedModel",
    dataset: PackedDataset,
    *,
    options: EvalOptions,
    console: Console,
) -> dict[str, float]:
    """Compares the two on every trained position of the data set.

    Returns:
        the means of `Comparison.summary()`.

    Raises:
        IncompatibleError: the models have different tokenizers.
    """
    from pmetal_distill.evaluation import Comparison

    check_same_tokenizer(teacher, student)
    comparison = Comparison(tuple(options.temperatures))
    total = min(dataset.num_targets, options.max_tokens or dataset.num_targets)
    with console.progress("evaluating", total=total, unit="tokens") as progress:
        for batch in token_batches(dataset, range(dataset.num_sequences), batch_size=options.batch_size):
            before = comparison.tokens
            _add_batch(comparison, teacher, student, batch, options)
            progress.advance(comparison.tokens - before)
            if comparison.tokens >= total:
                break
    return comparison.summary()


def _add_batch(
    comparison: "object",
    teacher: "LoadedModel",
    student: "LoadedModel",
    batch: TokenBatch,
    options: EvalOptions,
) -> None:
    import mlx.core as mx
    import numpy as np

    from pmetal_distill.evaluation import Comparison, compare_hidden

    assert isinstance(comparison, Comparison)
    token_ids = mx.array(batch.token_ids)
    rows = mx.array(np.flatnonzero(batch.loss_mask).astype(np.int32))
    labels = mx.array(batch.labels.reshape(-1))[rows]

    def trained_rows(model: "LoadedModel") -> mx.array:
        if model.splits:
            states = model.hidden(token_ids, documents=batch.documents).final
        else:
            states = model.full(token_ids, documents=batch.documents)
        return states.reshape(-1, states.shape[-1])[rows]

    def head(model: "LoadedModel", states: mx.array) -> mx.array:
        return model.logits(states) if model.splits else states

    compare_hidden(
        comparison,
        teacher_head=lambda states: head(teacher, states),
        teacher_hidden=trained_rows(teacher),
        student_head=lambda states: head(student, states),
        student_hidden=trained_rows(student),
        labels=labels,
        chunk_size=options.head_chunk,
    )
