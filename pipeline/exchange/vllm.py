"""vLLM's `prompt_logprobs`: one JSON object a line, as `RequestOutput` or as the server's response has it.

    {"prompt_token_ids": [5, 17], "prompt_logprobs": [null, {"17": {"logprob": -0.4, "rank": 1}, ...}]}

Entry t of the list is about token t, so it is row t - 1 here. It holds the top k and, if it is not among
them, the prompt's own token, whose rank is then above k: such an entry leaves a gap and is not kept.
Generated tokens with `logprobs` follow the prompt.

References:
    vllm/logprobs.py (Logprob, FlatLogprobs), vllm/outputs.py (RequestOutput, CompletionOutput).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.lines import read_json_lines
from pipeline.exchange.responses import (
    GAP,
    LEAST_LOGPROB,
    Entry,
    body_of,
    is_logprob,
    sequence_of_rows,
    without_gap,
)
from pipeline.exchange.sequences import Source, SourceSequence, token_array
from schemas.arrays import Int32
from schemas.errors import DataError


@dataclass(slots=True, eq=False)
class VllmSource(Source):
    """JSON lines with `prompt_logprobs`."""

    def sequences(self) -> Iterator[SourceSequence]:
        self.dropped.clear()
        for file in self.files:
            for line, record in read_json_lines(file):
                yield self._sequence(record, f"{file}:{line}")

    def _sequence(self, record: object, where: str) -> SourceSequence:
        prompt_ids, said, generated = _parts(record, where)
        rows = self._prompt_rows(said, prompt_ids, where)
        if generated is None:
            return sequence_of_rows(prompt_ids, rows, where)
        token_ids = token_array(generated.get("token_ids"), where, "'token_ids'")
        rows += self._rows(generated["logprobs"], token_ids, where, "logprobs")
        return sequence_of_rows(np.concatenate([prompt_ids, token_ids]), rows, where)

    def _prompt_rows(self, said: object, prompt_ids: Int32, where: str) -> list[list[Entry]]:
        if said is None:
            return [[] for _ in prompt_ids[1:]]
        positions = _positions(said, where)
        if len(positions) != len(prompt_ids) or (positions and positions[0]):
            found = (
                f"{len(positions)} for {len(prompt_ids)} tokens, the first {json.dumps(positions[:1])[:40]}"
            )
            raise DataError(
                f"{where}: prompt_logprobs must have an entry a token and null for the first, found {found}; "
                "write them as vLLM gives them"
            )
        return self._rows(positions[1:], prompt_ids[1:], where, "prompt_logprobs")

    def _rows(self, said: object, token_ids: Int32, where: str, name: str) -> list[list[Entry]]:
        positions = _positions(said, where)
        if len(positions) != len(token_ids):
            raise DataError(
                f"{where}: {name} must have one entry a token, found {len(positions)} for {len(token_ids)}; "
                "write them as vLLM gives them"
            )
        longest = max((len(position) for position in positions), default=0)
        rows = []
        for number, (position, own) in enumerate(zip(positions, token_ids.tolist(), strict=True)):
            if position and str(own) not in position:
                raise DataError(
                    f"{where}: {name} entry {number} must hold the text's own token {own}, found "
                    f"{list(position)[:5]}; see that tokens and entries are not shifted"
                )
            rows.append(self._entries(position, own, longest, f"{where} {name} entry {number}"))
        return rows

    def _entries(self, position: Mapping[str, Any], own: int, longest: int, where: str) -> list[Entry]:
        """The unbroken top of one position."""
        entries = [_entry(token, value, where) for token, value in position.items()]
        ranks = [rank for _, _, rank in entries]
        if None in ranks:
            kept = without_gap([(token, logprob) for token, logprob, _ in entries], own, longest=longest)
        else:
            entries.sort(key=lambda entry: entry[2] or 0)
            kept = [(t, p) for n, (t, p, rank) in enumerate(entries, start=1) if rank == n]
        self.dropped[GAP] += len(entries) - len(kept)
        return [(token, logprob) for token, logprob in kept if logprob > LEAST_LOGPROB]


def _parts(record: object, where: str) -> tuple[Int32, object, Mapping[str, Any] | None]:
    """Prompt ids, prompt_logprobs, and the generated part if it has logprobs."""
    body, choice = body_of(record, where)
    ids = choice.get("prompt_token_ids") or body.get("prompt_token_ids")
    said = choice.get("prompt_logprobs") or body.get("prompt_logprobs")
    outputs = body.get("outputs") or []
    if ids is None:
        raise DataError(
            f"{where}: must have 'prompt_token_ids', found {sorted(body)[:8]}; "
            "write them out, or ask the server for return_token_ids"
        )
    if not isinstance(outputs, list) or len(outputs) > 1 or not all(isinstance(o, Mapping) for o in outputs):
        raise DataError(f"{where}: must have one output at most, found others; ask for n=1")
    generated = outputs[0] if outputs and outputs[0].get("logprobs") else None
    if said is None and generated is None:
        raise DataError(
            f"{where}: must have 'prompt_logprobs', found none; ask vLLM for prompt_logprobs=20, say"
        )
    return token_array(ids, where, "'prompt_token_ids'"), said, generated


def _positions(said: object, where: str) -> list[Mapping[str, Any]]:
    """One mapping a position, empty where there is nothing; also of a FlatLogprobs."""
    if isinstance(said, Mapping) and "start_indices" in said:
        return _unflattened(said, where)
    if not isinstance(said, list) or not all(p is None or isinstance(p, Mapping) for p in said):
        raise DataError(f"{where}: log-probabilities must be a list of objects or null, found another shape")
    return [position or {} for position in said]


def _unflattened(flat: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    columns = [flat.get(name) for name in ("start_indices", "end_indices", "token_ids", "logprobs", "ranks")]
    starts, ends, ids, logprobs, ranks = (c if isinstance(c, list) else [] for c in columns)
    spans = list(zip(starts, ends, strict=False))
    edges = [edge for span in spans for edge in span]
    sound = (
        all(isinstance(column, list) for column in columns)
        and len(starts) == len(ends)
        and len(ids) == len(logprobs) == len(ranks)
        and all(type(edge) is int for edge in edges)
        and edges == sorted(edges)
        and (not edges or (edges[0] >= 0 and edges[-1] <= len(ids)))
    )
    if not sound:
        raise DataError(
            f"{where}: flat log-probabilities must have start_indices, end_indices, token_ids, logprobs and "
            "ranks that fit each other, found others; write FlatLogprobs as it is"
        )
    return [{str(ids[i]): {"logprob": logprobs[i], "rank": ranks[i]} for i in range(a, b)} for a, b in spans]


def _entry(token: str, value: Any, where: str) -> tuple[int, float, int | None]:
    logprob: Any
    logprob, rank = (value.get("logprob"), value.get("rank")) if isinstance(value, Mapping) else (value, None)
    sound = is_logprob(logprob) and (rank is None or type(rank) is int)
    if not sound or not token.isdecimal() or len(token) > 8:
        raise DataError(
            f"{where}: must map token ids to log-probabilities, found {token[:20]!r}: {str(value)[:60]}"
        )
    return int(token), float(logprob), rank
