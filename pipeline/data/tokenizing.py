"""Documents to token ids, with the tokens that `mlx_lm.lora` trains on for the same record.

Text gets the end-of-text token after it; chats go through the tokenizer's chat template. Where prompts are
masked, every message of the assistant is trained, as the template's `{% generation %}` marks say, or as
`answers` finds. One document at a
time and with nothing but the tokenizer's public methods; `tokenizing_batches` does many at once.

References:
    mlx_lm/tuner/datasets.py: TextDataset, ChatDataset, CompletionsDataset.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.answers import Span, answer_spans, assistant_turns, pieces, straddled_spans, token_spans
from pipeline.data.documents import MEND, Document, Message, plain_content
from schemas.errors import DataError, ModelError, UsageError


class Tokenizer(Protocol):
    """What is used of mlx-lm's `TokenizerWrapper` or of a tokenizer of transformers."""

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """One document as tokens.

    Attributes:
        token_ids: int32 [n], n >= 1.
        prompt_length: the first tokens that are prompt and not trained on; 0 unless prompts are masked.
        source: file it came from.
        line: 1-based line in it; 0 for a whole file.
        gaps: further tokens that are prompt, after answers: first and after the last of each run, ascending.
    """

    token_ids: NDArray[np.int32]
    prompt_length: int
    source: str
    line: int
    gaps: tuple[Span, ...] = ()


def tokenize(document: Document, tokenizer: Tokenizer, *, mask_prompt: bool = False) -> TokenizedDocument:
    """Turns one document into tokens.

    Args:
        document: what was read.
        tokenizer: the teacher's.
        mask_prompt: leave everything but what the assistant says out of the training.

    Raises:
        UsageError: `mask_prompt` for plain text, which has no prompt.
        ModelError: the tokenizer has no chat template, or no end-of-text token, where one is needed.
        DataError: the chat template refuses the messages, or does not show where they begin and end.
    """
    if document.kind == "text":
        eos = end_of_text(document, tokenizer, mask_prompt=mask_prompt)
        return finish_text(document, list(tokenizer.encode(document.text)), eos=eos)
    check_chat(document, tokenizer)
    token_ids = _refusable(document, lambda: _template(document, tokenizer)(list(document.messages)))
    if not mask_prompt or not token_ids:
        return finish_chat(document, token_ids)
    return finish_chat(document, token_ids, _answers(document, tokenizer, token_ids))


def end_of_text(document: Document, tokenizer: Tokenizer, *, mask_prompt: bool) -> int:
    """The token that ends a plain text; raises what `tokenize` raises where there can be none."""
    if mask_prompt:
        raise UsageError(
            f"{document.where}: --mask-prompt needs records with a prompt, found plain text; "
            "drop --mask-prompt or give 'messages' or 'prompt' and 'completion'"
        )
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("tokenizer: must have an end-of-text token, found none; set eos_token in its config")
    return eos


def finish_text(document: Document, token_ids: list[int], *, eos: int) -> TokenizedDocument:
    """A plain text from its ids, to which the end-of-text token may be added."""
    if not token_ids or token_ids[-1] != eos:
        token_ids.append(eos)
    return _tokenized(document, token_ids)


def check_chat(document: Document, tokenizer: Tokenizer) -> None:
    """Raises ModelError for a tokenizer without a chat template."""
    wrapped = getattr(tokenizer, "has_chat_template", None)
    if not (getattr(tokenizer, "chat_template", None) is not None if wrapped is None else wrapped):
        raise ModelError(
            f"{document.where}: chats need a tokenizer with a chat template, found none; use an instruct "
            "model as teacher, or give plain 'text' records"
        )


def marks_answers(tokenizer: Tokenizer) -> bool:
    """Whether the chat template marks what the assistant says itself."""
    template = getattr(tokenizer, "chat_template", None)
    return isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def renderer(document: Document, tokenizer: Tokenizer) -> Callable[..., str]:
    """What makes text of some of the document's messages."""
    template = _template(document, tokenizer)

    def render(messages: list[Message], **options: Any) -> str:
        text = template(messages, tokenize=False, **options)
        if not isinstance(text, str):
            raise TypeError(f"the template gave {type(text).__name__}, not text")
        return text

    return render


def finish_chat(
    document: Document, token_ids: list[int], answers: Sequence[Span] | None = None
) -> TokenizedDocument:
    """A chat from its ids and, where prompts are masked, the tokens of its answers.

    Raises:
        DataError: the template has made nothing of it.
    """
    if not token_ids:
        raise DataError(f"{document.where}: the chat template made no token of it; {MEND}")
    if answers is None:
        return _tokenized(document, token_ids)
    edges = [*answers, (len(token_ids), len(token_ids))]
    gaps = ((stop, start) for (_, stop), (start, _) in pairwise(edges))
    return _tokenized(
        document, token_ids, answers[0][0], tuple((stop, start) for stop, start in gaps if stop < start)
    )


def _answers(document: Document, tokenizer: Tokenizer, token_ids: list[int]) -> list[Span]:
    """Tokens that the assistant says."""
    assistant_turns(document)
    if marks_answers(tokenizer) and (marked := _marked(document, tokenizer, token_ids)):
        return marked
    render = renderer(document, tokenizer)
    whole = _refusable(document, lambda: render(list(document.messages)))
    spans = answer_spans(document, whole, render)
    encode = _encoder(document, tokenizer, whole, token_ids)
    found = token_spans(token_ids, [encode(piece) for piece in pieces(whole, spans)])
    return straddled_spans(token_ids, whole, spans, encode) if found is None else found


def _marked(document: Document, tokenizer: Tokenizer, token_ids: list[int]) -> list[Span]:
    """What the template's own marks say; empty if they say nothing of these tokens."""
    inner: Any = getattr(tokenizer.encode, "__self__", tokenizer)
    options: dict[str, Any] = {"tools": _tools(document)}
    if inner is not tokenizer:  # mlx-lm's wrapper names this one, and hides the mask
        options[getattr(tokenizer, "_thinking_kwarg", "enable_thinking")] = getattr(
            tokenizer, "has_thinking", False
        )
    found = _refusable(
        document,
        lambda: inner.apply_chat_template(
            list(document.messages), return_dict=True, return_assistant_tokens_mask=True, **options
        ),
    )
    if list(found["input_ids"]) != token_ids:
        return []
    edges = np.flatnonzero(np.diff(np.array([0, *found["assistant_masks"], 0], np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _encoder(
    document: Document, tokenizer: Tokenizer, whole: str, token_ids: list[int]
) -> Callable[[str], list[int]]:
    """What makes the ids that the chat template makes, from text."""
    any_tokenizer: Any = tokenizer
    inner: Any = getattr(tokenizer.encode, "__self__", tokenizer)

    def by_call(text: str) -> list[int]:
        return list(inner(text, add_special_tokens=False)["input_ids"])

    def by_encode(text: str) -> list[int]:
        return list(any_tokenizer.encode(text, add_special_tokens=False))

    for encode in (by_call, by_encode):
        if _refusable(document, partial(encode, whole)) == token_ids:
            return encode
    raise DataError(
        f"{document.where}: --mask-prompt needs a tokenizer that gives a chat the tokens of its rendered "
        "text, found other tokens; drop --mask-prompt"
    )


def _template(document: Document, tokenizer: Tokenizer) -> Callable[..., Any]:
    """Applies the chat template; to plain text, where it does not take parts or missing content."""

    def apply(messages: list[Message], **options: Any) -> Any:
        made = tokenizer.apply_chat_template(messages, return_dict=False, tools=_tools(document), **options)
        return made if isinstance(made, str) else list(made)

    def apply_plain(messages: list[Message], **options: Any) -> Any:
        try:
            return apply(messages, **options)
        except _refusals():
            plain = [plain_content(message) for message in messages]
            if plain == messages:
                raise
            with suppress(*_refusals()):
                return apply(plain, **options)
            raise

    return apply_plain


def _refusals() -> tuple[type[Exception], ...]:
    """What templates raise, which are programs of strangers."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError, KeyError)


def _tools(document: Document) -> list[Any] | None:
    return None if document.tools is None else list(document.tools)


def _refusable(document: Document, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except _refusals() as error:
        raise DataError(
            f"{document.where}: the chat template refuses the messages: {error}; {MEND}"
        ) from error


def _tokenized(
    document: Document, token_ids: list[int], prompt_length: int = 0, gaps: tuple[Span, ...] = ()
) -> TokenizedDocument:
    return TokenizedDocument(
        token_ids=np.array(token_ids, dtype=np.int32),
        prompt_length=prompt_length,
        source=document.source,
        line=document.line,
        gaps=gaps,
    )
