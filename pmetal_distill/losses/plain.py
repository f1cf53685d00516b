"""The chunked head in MLX ops: lazy, on any device, under `mx.compile`.

Every product of a chunk is chained to the next chunk's inputs with `mx.depends`. Without that, MLX is free to
make the logits of all chunks before it reduces the first. Logits and gradient rows are float32, products in
the head's own type, the head's gradient is summed in float32. Beside a student of 16 bits, gradients are made
of a sketch's tail in float16, half the traffic; that rounds as TF32 does, in which GPUs multiply float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise

import mlx.core as mx

from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses.chunk import Chunk
from pmetal_distill.losses.job import HeadJob, StepResult, TokenRows
from pmetal_distill.target import SoftTarget

_TINY = 1e-30


def step(hidden: mx.array, job: HeadJob) -> StepResult:
    """Losses and gradients of all tokens.

    Args:
        hidden: [N, d], any float type.
        job: what is wanted.
    """
    if hidden.dtype in (mx.float16, mx.bfloat16):
        job = replace(job, target=with_half_tail(job.target))
    parameters = job.parts.parameters()
    job = replace(job, parts=job.parts.in_type(hidden.dtype))
    sums: dict[str, mx.array] = {}
    soft: list[mx.array] = []
    hard: list[mx.array] = []
    by_hidden: list[mx.array] = []
    for index in token_slices(hidden.shape[0], job.chunk_tokens):
        done = [*by_hidden[-1:], *soft[-1:], *hard[-1:], *sums.values()]
        h, chunk = chained_chunk(hidden, job, index, after=done)
        logits = job.parts.logits(h)
        chunk = chunk if job.teacher_share is None else chunk.towards(logits, job.teacher_share)
        statistics, mask = chunk.statistics(logits), job.mask[index]
        rows = chunk.gradient(logits, statistics, soft=mask * job.soft_factor, hard=mask * job.hard_factor)
        rows = job.parts.through_cap(rows, logits).astype(h.dtype)
        by_hidden.append(job.parts.back(rows).astype(h.dtype))
        if "weight" in parameters:
            sums["weight"] = _add_product(sums.get("weight"), rows, h)
        if "bias" in parameters:
            column_sums = rows.astype(mx.float32).sum(axis=0)
            sums["bias"] = sums["bias"] + column_sums if "bias" in sums else column_sums
        soft.append(mx.where(mask > 0, chunk.soft(statistics), 0.0))
        hard.append(mx.where(mask > 0, chunk.hard(statistics), 0.0))
    gradients = [sums[name].astype(array.dtype) for name, array in parameters.items()]
    return StepResult(mx.concatenate(soft), mx.concatenate(hard), mx.concatenate(by_hidden), gradients)


def evaluate(hidden: mx.array, jobs: Sequence[HeadJob]) -> TokenRows:
    """What is known of each token, without gradients.

    Args:
        hidden: [N, d], any float type.
        jobs: one for each temperature, otherwise alike.
    """
    jobs = [replace(job, parts=job.parts.in_type(hidden.dtype)) for job in jobs]
    found: list[list[mx.array]] = []
    for index in token_slices(hidden.shape[0], jobs[0].chunk_tokens):
        after = found[-1] if found else []
        pairs = [chained_chunk(hidden, job, index, after=after) for job in jobs]
        logits = jobs[0].parts.logits(pairs[0][0]).astype(mx.float32)
        statistics = [chunk.statistics(logits) for _, chunk in pairs]
        chunk = pairs[0][1]
        first = [
            mx.stack([c.soft(s) for (_, c), s in zip(pairs, statistics, strict=True)]),
            chunk.hard(statistics[0]),
            mx.exp(-statistics[0].lse),
            _rank(logits, chunk.teacher_best()),
            _rank(logits, chunk.safe_labels()) * (chunk.labels != IGNORE_INDEX),
        ]
        counts = jobs[0].mask[index] > 0
        found.append([mx.where(counts, part, 0.0) for part in first])
    columns = zip(*found, strict=True)
    return TokenRows(*(mx.concatenate(list(parts), axis=-1) for parts in columns))


def with_half_tail(target: SoftTarget) -> SoftTarget:
    """The same with tail logits in float16 if it is a sketch.

    Columns of the bases are scaled to a largest entry of 1, and the coordinates with them: neither leaves the
    range of the type, as a product of both is part of a logit.
    """
    if target.coordinates is None or not target.bases:
        return target
    half = mx.float16
    largest = reduce(mx.maximum, [mx.abs(basis.components).max(axis=0) for basis in target.bases])
    scale = mx.maximum(largest, _TINY)
    bases = [
        replace(basis, mean=basis.mean.astype(half), components=(basis.components / scale).astype(half))
        for basis in target.bases
    ]
    ceiling = None if target.tail_ceiling is None else target.tail_ceiling.astype(half)
    coordinates = (target.coordinates * scale).astype(half)
    return replace(target, bases=tuple(bases), coordinates=coordinates, tail_ceiling=ceiling)


def _rank(logits: mx.array, tokens: mx.array) -> mx.array:
    picked = mx.take_along_axis(logits, tokens[:, None], axis=-1)
    return (logits > picked).sum(axis=-1).astype(mx.float32)


def token_slices(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """The fewest consecutive ranges of at most `chunk_tokens`, of almost equal length."""
    count = max(1, -(-num_tokens // chunk_tokens))
    bounds = [num_tokens * i // count for i in range(count + 1)]
    yield from (slice(*pair) for pair in pairwise(bounds))


def chained_chunk(
    hidden: mx.array, job: HeadJob, index: slice, *, after: list[mx.array]
) -> tuple[mx.array, Chunk]:
    """The hidden states and the task of some tokens, not to be computed before `after`.

    Hidden states of tokens that do not count become 0, so that NaN in padding reaches nothing; a live
    teacher's too.
    """
    counts = (job.mask[index] > 0)[:, None]
    target = job.target.tokens(index)
    arrays = target.arrays()
    if "source" in arrays:
        arrays["source"] = mx.where(counts, arrays["source"], 0.0).astype(arrays["source"].dtype)
    inputs = [mx.where(counts, hidden[index], 0.0).astype(hidden.dtype), *arrays.values()]
    if after and index.start:
        inputs = list(mx.depends(inputs, after))
    target = target.with_arrays(dict(zip(arrays, inputs[1:], strict=True)))
    return inputs[0], Chunk.of(target, job.labels[index], job.divergence, job.ops)


def _add_product(total: mx.array | None, rows: mx.array, h: mx.array) -> mx.array:
    """total + rows.T @ h, float32; one pass over the total less where the types agree."""
    if total is None:
        return (rows.T @ h).astype(mx.float32)
    if rows.dtype == h.dtype == mx.float32:
        return mx.addmm(total, rows.T, h)
    return total + (rows.T @ h).astype(mx.float32)
