"""Which part of a rendered chat the assistant says, found from the chat template itself.

An answer begins where the template's generation prompt ends, if the rendering of the messages before it with
that prompt is a prefix of the rendering of the whole chat, and it ends where the rendering of the chat up to
it ends. Templates that render a message in another way once more follow it, or whose generation prompt opens
a thinking block that the answer does not have, give no such prefix. There the message is rendered once more
with a marker for its content: what differs is the answer, what the generation prompt says before the marker
is not.

Costs two renderings of the chat's beginning an answer; three more where they are no prefixes.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from pipeline.data.documents import MEND, Document, Message
from schemas.errors import DataError

Render = Callable[..., str]
"""Messages, and `add_generation_prompt` where it is wanted, to text; raises whatever a template raises."""

Span = tuple[int, int]
"""First character or token, and the one after the last."""


def answer_spans(document: Document, whole: str, render: Render) -> list[Span]:
    """Characters of `whole`, the rendering of the document's chat, that its assistant says, in order.

    Raises:
        DataError: no message is the assistant's, or the template does not show where one begins and ends.
    """
    numbers = assistant_turns(document)
    spans: list[Span] = []
    after = 0
    for number in numbers:
        turn = _Turn(document, number, whole, render, after)
        spans.append(turn.span())
        after = spans[-1][1]
    return spans


def assistant_turns(document: Document) -> list[int]:
    """Numbers of the messages to train on.

    Raises:
        DataError: there are none.
    """
    numbers = [n for n, message in enumerate(document.messages) if message["role"] == "assistant"]
    if not numbers:
        found = ", ".join(dict.fromkeys(repr(message["role"]) for message in document.messages))
        raise DataError(
            f"{document.where}: --mask-prompt trains on messages whose role is 'assistant', found only "
            f"{found}; {MEND}"
        )
    return numbers


def pieces(whole: str, spans: Sequence[Span]) -> list[str]:
    """`whole` cut at the edges of `spans`: before the first, the first, between, ..., after the last."""
    edges = [0, *(edge for span in spans for edge in span), len(whole)]
    return [whole[start:stop] for start, stop in pairwise(edges)]


def token_spans(ids: list[int], parts: Sequence[Sequence[int]]) -> list[Span] | None:
    """Tokens of the answers, if the ids of the `pieces` are those of the whole; None if they are not."""
    if [token for part in parts for token in part] != ids:
        return None
    edges = [0]
    for part in parts:
        edges.append(edges[-1] + len(part))
    return list(zip(edges[1:-1:2], edges[2:-1:2], strict=True))


def straddled_spans(ids: list[int], whole: str, spans: Sequence[Span], encode: Any) -> list[Span]:
    """The same where tokens reach over an edge: such a token belongs to the answer.

    Args:
        ids: of the whole.
        whole: its text.
        spans: characters of the answers.
        encode: text to ids.
    """
    found: list[Span] = []
    for start, stop in spans:
        before, through = encode(whole[:start]), encode(whole[:stop])
        first, last = _common(before, ids), _common(through, ids)
        found.append((first, last if last == len(through) else last + 1))
    return found


class _Turn:
    """One message of the assistant inside the rendering of the whole chat."""

    def __init__(self, document: Document, number: int, whole: str, render: Render, after: int) -> None:
        self._document, self._number, self._whole, self._render = document, number, whole, render
        self._messages = list(document.messages)
        self._after = after
        self._marker = "\ue000answer\ue001"
        while self._marker in whole:
            self._marker += "\ue001"

    def span(self) -> Span:
        start, stop = self._start_by_prefix(), self._stop_by_prefix()
        if start is None or stop is None:
            marked = self._marked(self._messages)
            start = self._start_by_marker(marked) if start is None else start
            stop = self._stop_by_marker(marked) if stop is None else stop
        if not self._after <= start < stop <= len(self._whole):
            raise self._unclear()
        return start, stop

    def _start_by_prefix(self) -> int | None:
        return self._prefix(self._messages[: self._number], add_generation_prompt=True)

    def _stop_by_prefix(self) -> int | None:
        if self._number + 1 == len(self._messages):
            return len(self._whole)
        return self._prefix(self._messages[: self._number + 1])

    def _prefix(self, messages: list[Message], **options: Any) -> int | None:
        text = self._try(messages, **options)
        return len(text) if text is not None and self._whole.startswith(text) else None

    def _start_by_marker(self, marked: str) -> int:
        """Characters before the answer: all that the generation prompt says right before the marker."""
        generation = self._generation_prompt()
        place = marked.index(self._marker)
        # The message before gets a marker too, so that what a user quotes of a template is not searched.
        before = self._marked_before()
        opened, low = (marked, 0) if before is None else before
        here = opened.index(self._marker)
        start = place
        for length in range(len(generation), 0, -1):
            found = opened.rfind(generation[:length], low, here)
            if found >= 0:
                start = place - (here - found - length)
                break
        # A thinking block that the marked message lacks or has empty ends what both renderings share.
        return min(start, _common(self._whole, marked))

    def _stop_by_marker(self, marked: str) -> int:
        """Characters through the answer, with what the template always puts after it."""
        alone = self._marked(self._messages[: self._number + 1])
        ending = alone[alone.index(self._marker) + len(self._marker) :]
        following = marked[marked.index(self._marker) + len(self._marker) :]
        rest = following[_common(ending, following) :]
        if not self._whole.endswith(rest):
            raise self._unclear()
        return len(self._whole) - len(rest)

    def _generation_prompt(self) -> str:
        asked: list[list[Message]] = [self._messages[: self._number], [{"role": "user", "content": "a"}]]
        for messages in asked:
            without, with_prompt = self._try(messages), self._try(messages, add_generation_prompt=True)
            if without is not None and with_prompt is not None and with_prompt.startswith(without):
                return with_prompt[len(without) :]
        return ""

    def _marked(self, messages: list[Message]) -> str:
        text = self._try(_with_content(messages, self._number, self._marker))
        if text is None or text.count(self._marker) != 1:
            raise self._unclear()
        return text

    def _marked_before(self) -> tuple[str, int] | None:
        """The marked rendering with the message before it marked as well, and where that one ends."""
        if not self._number:
            return None
        other = self._marker.replace("answer", "before")
        both = _with_content(self._messages, self._number, self._marker)
        text = self._try(_with_content(both, self._number - 1, other))
        if text is None or text.count(self._marker) != 1 or text.count(other) != 1:
            return None
        low = text.index(other) + len(other)
        return (text, low) if low <= text.index(self._marker) else None

    def _try(self, messages: list[Message], **options: Any) -> str | None:
        try:
            return self._render(messages, **options)
        except Exception:  # noqa: BLE001 - templates are programs of strangers
            return None

    def _unclear(self) -> DataError:
        return DataError(
            f"{self._document.where}: --mask-prompt needs a chat template that shows where messages"
            f"[{self._number}] begins and ends, found none that does; mark the answers in the template with "
            "{% generation %} and {% endgeneration %}, or drop --mask-prompt"
        )


def _with_content(messages: list[Message], number: int, content: str) -> list[Message]:
    held = messages[number].get("content")
    value: Any = [{"type": "text", "text": content}] if isinstance(held, list | tuple) else content
    return [*messages[:number], {**messages[number], "content": value}, *messages[number + 1 :]]


def _common(one: Sequence[int] | str, two: Sequence[int] | str) -> int:
    for number, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return number
    return min(len(one), len(two))
