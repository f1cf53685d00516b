"""The chunked head in MLX ops: lazy, on any device, under `mx.compile`.

Every product of a chunk is chained to the next chunk's inputs with `mx.depends`. Without that, MLX is free to
make the logits of all chunks before it reduces the first. Logits and gradient rows are float32, products in
the head's own type, the head's gradient is summed in float32.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from pmetal_distill.losses.chunk import IGNORE_INDEX, Chunk, Statistics
from pmetal_distill.losses.job import HeadJob, StepResult, TokenRows


def step(hidden: mx.array, job: HeadJob) -> StepResult:
    """Losses and gradients of all tokens.

    Args:
        hidden: [N, d], any float type.
        job: what is wanted.
    """
    parameters = job.parts.parameters()
    sums = {name: mx.zeros(array.shape, mx.float32) for name, array in parameters.items()}
    soft: list[mx.array] = []
    hard: list[mx.array] = []
    by_hidden: list[mx.array] = []
    for index in token_slices(hidden.shape[0], job.chunk_tokens):
        done = [*by_hidden[-1:], *soft[-1:], *hard[-1:], *sums.values()]
        h, chunk = chained_chunk(hidden, job, index, after=done)
        logits = job.parts.logits(h)
        chunk = chunk if job.teacher_share is None else chunk.towards(logits, job.teacher_share)
        statistics = chunk.statistics(logits)
        rows = _gradient_rows(job, index, chunk, logits, statistics)
        small = rows.astype(h.dtype)
        by_hidden.append(job.parts.back(small).astype(h.dtype))
        if "weight" in sums:
            sums["weight"] = sums["weight"] + (small.T @ h).astype(mx.float32)
        if "bias" in sums:
            sums["bias"] = sums["bias"] + rows.astype(mx.float32).sum(axis=0)
        counts = job.mask[index] > 0
        soft.append(mx.where(counts, chunk.soft(statistics), 0.0))
        hard.append(mx.where(counts, chunk.hard(statistics), 0.0))
    gradients = [sums[name].astype(array.dtype) for name, array in parameters.items()]
    return StepResult(mx.concatenate(soft), mx.concatenate(hard), mx.concatenate(by_hidden), gradients)


def evaluate(hidden: mx.array, jobs: Sequence[HeadJob]) -> TokenRows:
    """What is known of each token, without gradients.

    Args:
        hidden: [N, d], any float type.
        jobs: one for each temperature, otherwise alike.
    """
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


def _rank(logits: mx.array, tokens: mx.array) -> mx.array:
    picked = mx.take_along_axis(logits, tokens[:, None], axis=-1)
    return (logits > picked).sum(axis=-1).astype(mx.float32)


def token_slices(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Consecutive ranges of at most `chunk_tokens`."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def chained_chunk(
    hidden: mx.array, job: HeadJob, index: slice, *, after: list[mx.array]
) -> tuple[mx.array, Chunk]:
    """The hidden states and the task of some tokens, not to be computed before `after`.

    Hidden states of tokens that do not count become 0, so that NaN in padding reaches nothing.
    """
    target = job.target.tokens(index)
    arrays = target.arrays()
    counts = (job.mask[index] > 0)[:, None]
    inputs = [mx.where(counts, hidden[index], 0.0).astype(hidden.dtype), *arrays.values()]
    if after and index.start:
        inputs = list(mx.depends(inputs, after))
    target = target.with_arrays(dict(zip(arrays, inputs[1:], strict=True)))
    return inputs[0], Chunk.of(target, job.labels[index], job.divergence, job.ops)


def _gradient_rows(
    job: HeadJob, index: slice, chunk: Chunk, logits: mx.array, statistics: Statistics
) -> mx.array:
    mask = job.mask[index]
    rows = chunk.gradient(logits, statistics, soft=mask * job.soft_factor, hard=mask * job.hard_factor)
    rows = job.parts.through_cap(rows, logits)
    return mx.where((mask > 0)[:, None], rows, 0.0)
