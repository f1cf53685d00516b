"""The chunked head on the CPU: BLAS for products, NumPy for everything done to a row.

MLX's CPU build spends 14 to 28 ns on an `exp`, NumPy 0.5 ns on data in the processor's cache, so rows are
worked on in place, a few at a time, on several threads. Tokens that do not count are left out before the
first product. Costs the head's products and about 4 ns a logit and thread; memory is one chunk of logits (two
for a sketch or a dense teacher) and the head's gradient.

Works by evaluating its inputs, so not inside `mx.compile`. Nothing made here is part of MLX's graph, which
would keep every chunk alive while a gradient is being traced.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses.blas import multiply_into
from pmetal_distill.losses.head import HeadParts, Identity
from pmetal_distill.losses.host_rows import Array, RowData, Work, process, ranks, to_logits
from pmetal_distill.losses.job import HeadJob, StepResult, TokenRows

Index = npt.NDArray[np.integer[Any]]

_BLOCK_ELEMENTS = 1 << 16
_MAX_THREADS = 8


def can_evaluate(array: mx.array) -> bool:
    """Whether values can be had now, which they cannot inside `mx.compile`."""
    try:
        mx.eval(array)
    except ValueError as error:
        if "during function transformations" in str(error):
            return False
        raise
    return True


def step(hidden: mx.array, job: HeadJob) -> StepResult:
    """Losses and gradients of all tokens; see `plain.step`."""
    by_hidden = mx.zeros(hidden.shape)
    sums = {name: mx.zeros(array.shape) for name, array in job.parts.parameters().items()}
    mx.eval(by_hidden, *sums.values())
    with _Pass(hidden, job, gradient=True) as tokens:
        for index in tokens.chunks():
            h, rows = tokens.process(index)
            if "weight" in sums:
                multiply_into(_view(sums["weight"]), rows, h, a_transposed=True, add=True)
            if "bias" in sums:
                _view(sums["bias"])[:] += rows.sum(axis=0)
            _view(by_hidden)[index] = tokens.back(h, rows)
    soft, hard = mx.array(tokens.results.soft), mx.array(tokens.results.hard)
    return StepResult(soft, hard, by_hidden, list(sums.values()))


def evaluate(hidden: mx.array, jobs: Sequence[HeadJob]) -> TokenRows:
    """What is known of each token without gradients; see `plain.evaluate`."""
    with ExitStack() as stack:
        passes = [stack.enter_context(_Pass(hidden, job, gradient=False)) for job in jobs]
        for index in passes[0].chunks():
            for tokens in passes:
                tokens.process(index)
    soft = mx.array(np.stack([tokens.results.soft for tokens in passes]))
    first = passes[0].results
    return TokenRows(
        soft, *(mx.array(a) for a in (first.hard, first.confidence, first.teacher_rank, first.label_rank))
    )


@dataclass(frozen=True, slots=True)
class _Results:
    """What is known of each token afterwards, [N]; see `TokenRows`."""

    soft: Array
    hard: Array
    confidence: Array
    teacher_rank: Array
    label_rank: Array


class _Pass:
    """One pass over the tokens of a job: views of its arrays, scratch, threads."""

    def __init__(self, hidden: mx.array, job: HeadJob, *, gradient: bool) -> None:
        self._job = job
        self._hidden, self._weight = _float32(hidden), _dense(job.parts)
        mx.eval(job.labels, job.mask, *job.target.arrays().values())
        self._data, self._valid = _row_data(job), _view(job.labels) != IGNORE_INDEX
        n, vocab = len(self._hidden), job.target.vocab_size
        self.results = _Results(*np.zeros((5, n), np.float32))
        self._tokens = np.flatnonzero(_view(job.mask) > 0)
        chunk_tokens = min(job.chunk_tokens, max(1, len(self._tokens)))
        self._logits = np.empty((chunk_tokens, vocab), np.float32)
        self._teacher = np.empty((chunk_tokens if job.target.complete else 0, vocab), np.float32)
        block = max(1, min(_BLOCK_ELEMENTS // vocab, chunk_tokens))
        work = Work(
            _number(job.target.inv_temperature),
            job.divergence,
            gradient,
            None if job.parts.bias is None else _float32(job.parts.bias),
            job.parts.scale,
            job.parts.softcap,
            np.empty((3, block, vocab), np.float32),
        )
        self._works = [work._replace(buffers=np.empty_like(work.buffers)) for _ in range(num_threads())]
        self._pool = ThreadPoolExecutor(len(self._works))

    def __enter__(self) -> "_Pass":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def chunks(self) -> Iterator[Index]:
        """Numbers of the tokens that count, a chunk at a time."""
        for start in range(0, len(self._tokens), len(self._logits)):
            yield self._tokens[start : start + len(self._logits)]

    def process(self, index: Index) -> tuple[Array, Array]:
        """Fills in the results of some tokens.

        Returns:
            their hidden states, and with gradients the gradient rows by the head's products; valid until the
            next call.
        """
        h, rows, data = self._hidden[index], self._logits[: len(index)], self._data.rows(index)
        if self._weight is None:
            rows[:] = h[:, : rows.shape[1]]
        else:
            multiply_into(rows, h, self._weight, b_transposed=True)
        teacher = self._teacher_rows(index)
        size = self._works[0].buffers.shape[1]
        blocks = [slice(i, i + size) for i in range(0, len(index), size)]

        def run(work: Work, mine: list[slice]) -> None:
            with np.errstate(all="ignore"):
                for b in mine:
                    part = None if teacher is None else teacher[b]
                    self._block(rows[b], part, data.rows(b), work, index[b])

        list(
            self._pool.map(run, self._works, (blocks[i :: len(self._works)] for i in range(len(self._works))))
        )
        return h, rows

    def back(self, h: Array, rows: Array) -> Array:
        """Gradient by the products [n, V] -> gradient by the hidden states `h` [n, d]."""
        found = np.zeros_like(h) if self._weight is None else np.empty_like(h)
        if self._weight is None:
            found[:, : rows.shape[1]] = rows
        else:
            multiply_into(found, rows, self._weight)
        return found

    def _block(self, rows: Array, teacher: Array | None, data: RowData, work: Work, index: Index) -> None:
        valid, results = self._valid[index], self.results
        to_logits(rows, work)
        if not work.gradient:
            above_teacher, above_label = ranks(rows, teacher, data)
            results.teacher_rank[index], results.label_rank[index] = above_teacher, above_label * valid
        losses = process(rows, teacher, data, work)
        results.soft[index], results.hard[index] = losses.soft, losses.hard * valid
        results.confidence[index] = losses.confidence

    def _teacher_rows(self, index: Index) -> Array | None:
        """Teacher logits in memory that may be overwritten; None for a target over head and tail."""
        target, rows = self._job.target, self._teacher[: len(index)]
        if not target.complete:
            return None
        if target.kind == "sketch" and len(target.bases) == 1 and target.coordinates is not None:
            basis = target.bases[0]
            rows[:] = _float32(basis.mean)
            y = _view(target.coordinates)[index]
            multiply_into(rows, y, _float32(basis.components), b_transposed=True, add=True)
            if target.tail_ceiling is not None:
                np.minimum(rows, _view(target.tail_ceiling)[index][:, None], out=rows)
            return rows
        chosen = target.tokens(mx.array(index))
        rows[:] = _float32(chosen.tail_logits() if target.kind == "sketch" else chosen.logits())
        return rows


def num_threads() -> int:
    """Threads that work on rows: the processor's cores, at most 8."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(available or 1, _MAX_THREADS)


def _view(array: mx.array) -> Array:
    """The memory of an evaluated array; writing to it changes the array."""
    return np.asarray(array)


def _float32(array: mx.array) -> Array:
    """Read-only use: the memory of an array, evaluated, contiguous, float32."""
    converted = array.astype(mx.float32)
    mx.eval(converted)
    return np.ascontiguousarray(_view(converted))


def _number(value: mx.array | float) -> np.float32:
    return np.float32(np.asarray(value))


def _dense(parts: HeadParts) -> Array | None:
    """The head's matrix; None where the states are logits."""
    weight = parts.weight
    if isinstance(weight, Identity):
        return None
    return _float32(weight if isinstance(weight, mx.array) else weight.unpacked())


def _row_data(job: HeadJob) -> RowData:
    target, mask, labels = job.target, _view(job.mask), _view(job.labels)
    valid = labels != IGNORE_INDEX
    n = len(labels)
    ids: Index = np.zeros((n, 0), np.int32)
    head: Array = np.zeros((n, 0), np.float32)
    tail: Array = np.zeros(n, np.float32)
    if target.head_ids is not None and target.head_logprobs is not None and target.tail_logprobs is not None:
        ids, head, tail = (
            np.asarray(target.head_ids),
            _view(target.head_logprobs),
            _view(target.tail_logprobs),
        )
    soft, hard = mask * _number(job.soft_factor), mask * valid * _number(job.hard_factor)
    return RowData(np.where(valid, labels, 0), soft, hard, ids, head, tail)
