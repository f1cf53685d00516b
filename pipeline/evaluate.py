"""How close a student is to its teacher on text it has not seen: a live teacher, or what a cache holds of it.

A live teacher costs a forward pass of both models, a cache one of the student. Nothing of size
[tokens, vocabulary] is ever made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.batching import TokenBatch, token_batches
from pipeline.console import Console
from pipeline.data import PackedDataset
from pipeline.data.kinds import DocumentKinds
from schemas.errors import IncompatibleError

if TYPE_CHECKING:
    import mlx.core as mx

    from pmetal_distill.evaluation import Comparison
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.batch import Batch
    from pmetal_distill.offline.reader import LogitCache
    from pmetal_distill.teaching import CachedTeacher

DEFAULT_TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        temperatures: where KL(teacher || student) is taken.
        batch_size: sequences at a time.
        head_chunk: rows of logits alive at once; by the device if None.
        max_tokens: stop behind so many tokens; None takes all.
    """

    temperatures: Sequence[float] = DEFAULT_TEMPERATURES
    batch_size: int = 8
    head_chunk: int | None = None
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
    kinds: DocumentKinds | None = None,
) -> dict[str, Any]:
    """Compares the two on every trained position of the data set.

    Args:
        teacher, student: in evaluation mode.
        dataset: in the teacher's tokens.
        options: how.
        console: where progress goes.
        kinds: of the documents, to tell them apart.

    Returns:
        `Comparison.report()`.

    Raises:
        IncompatibleError: the models have different tokenizers.
    """
    from pmetal_distill.evaluation import Comparison

    check_same_tokenizer(teacher, student)
    comparison = Comparison(tuple(options.temperatures), () if kinds is None else kinds.names)
    total = min(dataset.num_targets, options.max_tokens or dataset.num_targets)
    with console.progress("evaluating", total=total, unit="tokens") as progress:
        for batch in token_batches(dataset, range(dataset.num_sequences), batch_size=options.batch_size):
            before = comparison.tokens
            _add_batch(comparison, teacher, student, batch, options, kinds)
            progress.advance(comparison.tokens - before)
            if comparison.tokens >= total:
                break
    return comparison.report()


def _add_batch(
    comparison: "Comparison",
    teacher: "LoadedModel",
    student: "LoadedModel",
    batch: TokenBatch,
    options: EvalOptions,
    kinds: DocumentKinds | None,
) -> None:
    from pmetal_distill.evaluation import compare_hidden, document_positions
    from pmetal_distill.evaluation.scores import rows_to_compare
    from pmetal_distill.host_inputs import to_device

    mask, token_ids = batch.loss_mask, to_device(batch.token_ids)
    rows = to_device(np.flatnonzero(mask).astype(np.int32))

    def trained_rows(model: "LoadedModel") -> "mx.array":
        if model.splits:
            states = model.hidden(token_ids, documents=batch.documents).final
        else:
            states = model.full(token_ids, documents=batch.documents)
        return states.reshape(-1, states.shape[-1])[rows]

    def head(model: "LoadedModel", states: "mx.array") -> "mx.array":
        return model.logits(states) if model.splits else states

    compare_hidden(
        comparison,
        teacher_head=lambda states: head(teacher, states),
        teacher_hidden=trained_rows(teacher),
        student_head=lambda states: head(student, states),
        student_hidden=trained_rows(student),
        labels=to_device(batch.labels[mask]),
        positions=document_positions(batch.documents)[mask],
        kinds=None if kinds is None else kinds.of_document[batch.documents[mask]],
        chunk_size=options.head_chunk or rows_to_compare(teacher.vocab_size),
    )


def evaluate_cache(
    cache: "LogitCache",
    student: "LoadedModel",
    numbers: npt.NDArray[np.int64],
    *,
    options: EvalOptions,
    console: Console,
) -> dict[str, Any]:
    """Compares a student with what a cache holds of its teacher.

    KL is as exact as the targets: nearly so with tail `sketch`, a lower bound with `bucket`, and against the
    renormalised head with `none`.

    Args:
        cache: open.
        student: in evaluation mode.
        numbers: sequences to read.
        options: how.
        console: where progress goes.

    Returns:
        `Comparison.report()`, without what needs the teacher's probability of every token.

    Raises:
        IncompatibleError: another tokenizer, or a student that is too small for the cached ids.
        UsageError: a temperature that the targets do not reach.
    """
    from pipeline.training.student import check_student
    from pmetal_distill.evaluation import Comparison
    from pmetal_distill.teaching import CachedTeacher

    check_student(student, cache)
    teacher, comparison = CachedTeacher(cache, student.vocab_size), Comparison(tuple(options.temperatures))
    with (
        cache.batches(
            batch_size=options.batch_size, seed=0, epochs=1, shuffle=False, window=1, subset=numbers
        ) as batches,
        console.progress("evaluating", total=len(numbers), unit="sequences") as progress,
    ):
        for batch in batches:
            _add_cached_batch(comparison, teacher, student, batch, options)
            progress.advance(len(batch.numbers))
            if options.max_tokens is not None and comparison.tokens >= options.max_tokens:
                break
    return comparison.report()


def _add_cached_batch(
    comparison: "Comparison",
    teacher: "CachedTeacher",
    student: "LoadedModel",
    batch: "Batch",
    options: EvalOptions,
) -> None:
    from pmetal_distill.evaluation import Question, TokenScores, document_positions, target_rows
    from pmetal_distill.losses.divergences import Divergence

    questions = [Question(Divergence("forward_kl"), t) for t in options.temperatures]
    rows = target_rows(student, teacher, batch, questions, chunk_tokens=options.head_chunk)
    mask = batch.loss_mask
    scores = TokenScores.of_rows(rows, batch.labels.reshape(-1), mask.reshape(-1))
    comparison.add_scores(scores, positions=document_positions(batch.documents)[mask])
