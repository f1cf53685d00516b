"""`top_logprobs` of servers with OpenAI's interface: one response a line, bare or out of a batch file.

    completions, echo  choices[0].logprobs = {"tokens": [...], "top_logprobs": [null, {" the": -0.4}, ...]}
    chat               choices[0].logprobs.content = [{"token": "The", "top_logprobs": [{...}]}, ...]

An entry describes its own token, so entry t is row t - 1 here. Tokens are strings: a position with one that
maps to no single id loses its target and is counted; a text that does not map is refused. A response
without its prompt needs one in the line: `prompt_token_ids`, or `messages` or `prompt` of the request.

References:
    vllm/entrypoints/openai/completion/serving.py, chat_completion/serving.py: at most k + 1 entries, the
    text's own token first, without ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.lines import read_json_lines
from pipeline.exchange.responses import (
    GAP,
    LEAST_LOGPROB,
    UNMAPPED,
    Entry,
    body_of,
    is_logprob,
    sequence_of_rows,
    without_gap,
)
from pipeline.exchange.sequences import Source, SourceSequence, token_array
from pipeline.exchange.vocabulary import Vocabulary
from schemas.arrays import Int32
from schemas.errors import DataError

_ASK = "ask the server for token ids (vLLM: return_token_ids, return_tokens_as_token_ids)"


@dataclass(frozen=True, slots=True)
class _Position:
    """One described token: what it is called, its bytes or None, and (string, bytes, logprob) of the top."""

    token: object
    data: object
    top: Sequence[tuple[object, object, object]]


@dataclass(slots=True, eq=False)
class OpenAISource(Source):
    """JSON lines with `top_logprobs`.

    Attributes:
        tokenizer: the teacher's.
        vocabulary: made of it.
    """

    tokenizer: Any = None
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary({}))

    def sequences(self) -> Iterator[SourceSequence]:
        self.dropped.clear()
        for file in self.files:
            for line, record in read_json_lines(file):
                yield self._sequence(record, f"{file}:{line}")

    def _sequence(self, record: object, where: str) -> SourceSequence:
        body, choice = body_of(record, where)
        positions, echo = _described(choice, where)
        prompt = None if echo else self._prompt(record, body, choice, where)
        own = self._own_ids(positions, body, choice, where, echo=echo)
        longest = max(len(p.top) for p in positions)
        rows = [self._entries(p, int(i), longest, where) for p, i in zip(positions, own, strict=True)]
        if prompt is None:
            return sequence_of_rows(own, rows[1:], where)
        silent: list[list[Entry]] = [[] for _ in prompt[1:]]
        return sequence_of_rows(np.concatenate([prompt, own]), silent + rows, where)

    def _entries(self, position: _Position, own: int, longest: int, where: str) -> list[Entry]:
        entries = []
        for token, data, logprob in position.top:
            if not is_logprob(logprob):
                raise DataError(
                    f"{where}: log-probabilities must be numbers, found {logprob!r} at {token!r:.40}"
                )
            token_id = self.vocabulary.id_of(token, data)
            if token_id is None:
                self.dropped[UNMAPPED] += 1
                return []
            entries.append((token_id, float(logprob)))  # type: ignore[arg-type]
        kept = without_gap(entries, own, longest=longest) if entries else []
        self.dropped[GAP] += len(entries) - len(kept)
        return [(token_id, logprob) for token_id, logprob in kept if logprob > LEAST_LOGPROB]

    def _own_ids(
        self,
        positions: list[_Position],
        body: Mapping[str, Any],
        choice: Mapping[str, Any],
        where: str,
        *,
        echo: bool,
    ) -> Int32:
        """Ids of the described tokens: as the server gives them, else from their strings."""
        ids = choice.get("token_ids")
        before = choice.get("prompt_token_ids") or body.get("prompt_token_ids") if echo else []
        if isinstance(ids, list) and isinstance(before, list) and len(before) + len(ids) == len(positions):
            return token_array(before + ids, where, "'token_ids'")
        found = [self.vocabulary.id_of(p.token, p.data) for p in positions]
        if None in found:
            number = found.index(None)
            raise DataError(
                f"{where}: each token of the text must stand for one token of the tokenizer, found "
                f"{positions[number].token!r:.40} as number {number}; {_ASK}"
            )
        return token_array(found, where)

    def _prompt(
        self, record: object, body: Mapping[str, Any], choice: Mapping[str, Any], where: str
    ) -> Int32:
        """Ids of what the model had read before it answered."""
        assert isinstance(record, Mapping)
        request = record.get("request")
        places = [choice, body, record, request if isinstance(request, Mapping) else {}]
        for place in places:
            if place.get("prompt_token_ids"):
                return token_array(place["prompt_token_ids"], where, "'prompt_token_ids'")
        for place in places[2:]:
            if isinstance(place.get("messages"), list):
                return self._templated(place["messages"], where)
            if isinstance(place.get("prompt"), str):
                return token_array(list(self.tokenizer.encode(place["prompt"])), where, "the prompt's tokens")
        raise DataError(
            f"{where}: must tell the prompt, found none of 'prompt_token_ids', 'messages', 'prompt'; put the "
            "request beside the response, or ask for echo"
        )

    def _templated(self, messages: list[Any], where: str) -> Int32:
        from jinja2 import TemplateError

        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"{where}: the chat template must take the messages, found: {error}; correct them"
            ) from error
        return token_array(list(ids), where, "the prompt's tokens")


def _described(choice: Mapping[str, Any], where: str) -> tuple[list[_Position], bool]:
    """The described tokens, and whether they begin with the text's first (which nothing describes)."""
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, Mapping) and isinstance(logprobs.get("content"), list) and logprobs["content"]:
        return [_chat_position(p, where) for p in logprobs["content"]], False
    if isinstance(logprobs, Mapping) and isinstance(logprobs.get("top_logprobs"), list):
        tokens, tops = logprobs.get("tokens"), logprobs["top_logprobs"]
        if not isinstance(tokens, list) or len(tokens) != len(tops) or not tokens:
            raise DataError(f"{where}: 'tokens' and 'top_logprobs' must have one length, found others")
        positions = [_text_position(t, top, where) for t, top in zip(tokens, tops, strict=True)]
        return positions, tops[0] is None
    raise DataError(
        f"{where}: must have logprobs with 'content' or 'top_logprobs', found {str(logprobs)[:60]}; ask for "
        "logprobs and top_logprobs"
    )


def _chat_position(position: Any, where: str) -> _Position:
    top = position.get("top_logprobs") if isinstance(position, Mapping) else None
    if not isinstance(top, list) or not all(isinstance(entry, Mapping) for entry in top):
        raise DataError(f"{where}: each token must have a list of top_logprobs, found {str(position)[:60]}")
    entries = [(entry.get("token"), entry.get("bytes"), entry.get("logprob")) for entry in top]
    return _Position(position.get("token"), position.get("bytes"), entries)


def _text_position(token: Any, top: Any, where: str) -> _Position:
    if top is not None and not isinstance(top, Mapping):
        raise DataError(f"{where}: top_logprobs must be objects or null, found {str(top)[:60]}")
    return _Position(token, None, [(name, None, logprob) for name, logprob in (top or {}).items()])
