"""What the report of a cache is drawn from. Costs the decoding of a few dozen row groups, heads only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.reporting.entropy import entropy
from pipeline.reporting.pieces import TokenNames, text_pieces
from pipeline.reporting.text_page import Choice, Token, chance
from schemas.arrays import TargetArrays

if TYPE_CHECKING:
    from pmetal_distill.offline.batch import StoredSequence
    from pmetal_distill.offline.reader import LogitCache

TEMPERATURES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
SAMPLED_SEQUENCES = 48
SHOWN_SEQUENCES, SHOWN_TOKENS = 4, 640
SHOWN_CHOICES = 5


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over tokens at one temperature: its mean, and the bounds of the middle 80 %."""

    temperature: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """The teacher's entropy (nats) and tail mass by temperature, on `tokens` sampled tokens."""

    tokens: int
    entropy: list[Spread]
    tail: list[Spread]


def open_heads(place: str) -> "LogitCache":
    """The cache, finished or not, without its sketches.

    Raises:
        CacheError: it cannot be read.
    """
    from pmetal_distill.offline.reader import LogitCache

    return LogitCache(place, rank=0, allow_partial=True)


def spread_numbers(numbers: npt.NDArray[np.int64], count: int) -> list[int]:
    """At most `count` sequence numbers, evenly spread."""
    if len(numbers) <= count:
        return [int(n) for n in numbers]
    return [int(n) for n in numbers[np.linspace(0, len(numbers) - 1, count).astype(int)]]


def uncertainty(cache: "LogitCache") -> Uncertainty:
    """Entropy and tail mass of sampled tokens at every temperature that the cache serves."""
    rows: list[StoredSequence] = [
        cache.sequence(number) for number in spread_numbers(cache.numbers, SAMPLED_SEQUENCES)
    ]
    targets = TargetArrays.concatenate([row.targets[row.loss_mask] for row in rows])
    spec, least = cache.spec, 1 / max(cache.spec.curve_nodes, default=1.0)
    entropies, tails = [], []
    for temperature in (t for t in TEMPERATURES if t >= least):
        nats, tail = entropy(targets, spec, temperature=temperature)
        entropies.append(_spread(temperature, nats))
        tails.append(_spread(temperature, tail))
    return Uncertainty(len(targets.head_ids), entropies, tails)


def _spread(temperature: float, values: npt.NDArray[np.float64]) -> Spread:
    low, high = np.quantile(values, (0.1, 0.9))
    return Spread(temperature, float(values.mean()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class ShardErrors:
    """What the writer measured: temperature -> (shard, value); and which shards have a basis of their own."""

    by_temperature: dict[float, list[tuple[float, float]]]
    refitted: list[int]


def shard_errors(cache: "LogitCache", name: str) -> ShardErrors:
    """The figures `name`@T of the commit records."""
    found: dict[float, list[tuple[float, float]]] = {}
    for record in cache.records:
        for key, value in record.measured.items():
            kind, at, temperature = key.partition("@")
            if kind == name and at and _is_number(temperature):
                found.setdefault(float(temperature), []).append((record.shard, value))
    refitted = [record.shard for record in cache.records if record.measured.get("refitted")]
    return ShardErrors(dict(sorted(found.items())), refitted)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def shown_sequences(cache: "LogitCache", numbers: npt.NDArray[np.int64]) -> "list[StoredSequence]":
    """A few sequences spread over the data, as many tokens as fit on a page."""
    rows: list[StoredSequence] = []
    left = SHOWN_TOKENS
    for number in spread_numbers(numbers, SHOWN_SEQUENCES):
        row = cache.sequence(number)
        if rows and len(row) > left:
            break
        rows.append(row)
        left -= len(row)
    return rows


def teacher_tokens(
    row: "StoredSequence", cache: "LogitCache", tokenizer: Any, *, most: int = SHOWN_TOKENS
) -> list[Token]:
    """A sequence as text, every token with the teacher's entropy about it and the likeliest tokens, at T=1.

    What the cache holds at a position is about the token behind it, so the first token of a document has
    nothing.
    """
    ids = [int(i) for i in row.token_ids[:most]]
    pieces = text_pieces(tokenizer, ids)
    names = TokenNames(tokenizer, ids[0])
    nats, _ = entropy(row.targets, cache.spec, temperature=1.0)
    tokens = [Token(pieces[0])]
    for position in range(len(ids) - 1):
        if not predicts_next(row, position):
            tokens.append(Token(pieces[position + 1]))
            continue
        choices, remark = head_choices(row, position, cache, names)
        lists = [("the teacher expected", choices)]
        tokens.append(Token(pieces[position + 1], float(nats[position]), lists, remark))
    return tokens


def predicts_next(row: "StoredSequence", position: int) -> bool:
    """Whether there is a target at a position, and the token behind it is of the same document."""
    return bool(row.loss_mask[position]) and row.documents[position] == row.documents[position + 1]


def head_choices(
    row: "StoredSequence", position: int, cache: "LogitCache", names: TokenNames
) -> tuple[Sequence[Choice], str]:
    """The teacher's likeliest tokens at T=1, and what it gave the token that came."""
    from pmetal_distill.offline.rebuild import head_logprobs

    head, _ = head_logprobs(row.targets[position : position + 1], cache.spec, temperature=1.0)
    probabilities, ids = np.exp(head[0]), row.targets.head_ids[position]
    came = int(row.token_ids[position + 1])
    choices = [
        Choice(names(int(i)), float(p), int(i) == came)
        for i, p in zip(ids[:SHOWN_CHOICES], probabilities[:SHOWN_CHOICES], strict=True)
    ]
    rank = np.flatnonzero(ids == came)
    if not rank.size:
        return choices, f"not among its first {len(ids)}"
    return choices, f"its choice {int(rank[0]) + 1}, {chance(float(probabilities[rank[0]]))}"
