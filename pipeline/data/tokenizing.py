"""Documents to token ids, with the tokens that `mlx_lm.lora` trains on for the same record.

Text gets the end-of-text token behind it; chats go through the tokenizer's chat template. One document at a
time and with nothing but the tokenizer's public methods; `tokenizing_batches` does many at once.

References:
    mlx_lm/tuner/datasets.py: TextDataset, ChatDataset, CompletionsDataset.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
    """

    token_ids: NDArray[np.int32]
    prompt_length: int
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that go through the chat template.

    Attributes:
        messages: the first argument of `apply_chat_template`.
        options: the others, but for the form of its result.
    """

    messages: list[Message]
    options: dict[str, Any]


def tokenize(document: Document, tokenizer: Tokenizer, *, mask_prompt: bool = False) -> TokenizedDocument:
    """Turns one document into tokens.

    Args:
        document: what was read.
        tokenizer: the teacher's.
        mask_prompt: leave everything but the last message out of the training.

    Raises:
        UsageError: `mask_prompt` for plain text, which has no prompt.
        ModelError: the tokenizer has no chat template, or no end-of-text token, where one is needed.
        DataError: the chat template refuses the messages.
    """
    if document.kind == "text":
        eos = end_of_text(document, tokenizer, mask_prompt=mask_prompt)
        return finish_text(document, list(tokenizer.encode(document.text)), eos=eos)
    check_chat(document, tokenizer)
    wanted = conversations(document, mask_prompt=mask_prompt)
    return finish_chat(document, [_apply_template(document, tokenizer, one) for one in wanted])


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
    return _tokenized(document, token_ids, prompt_length=0)


def check_chat(document: Document, tokenizer: Tokenizer) -> None:
    """Raises ModelError for a tokenizer without a chat template."""
    wrapped = getattr(tokenizer, "has_chat_template", None)
    if not (getattr(tokenizer, "chat_template", None) is not None if wrapped is None else wrapped):
        raise ModelError(
            f"{document.where}: chats need a tokenizer with a chat template, found none; use an instruct "
            "model as teacher, or give plain 'text' records"
        )


def conversations(document: Document, *, mask_prompt: bool) -> list[Conversation]:
    """What is tokenized of a chat: all of it, and where prompts are masked all before its last message."""
    tools = None if document.tools is None else list(document.tools)
    whole = Conversation(list(document.messages), {"tools": tools})
    *prompt, last = document.messages
    if not mask_prompt or not prompt:
        return [whole]
    return [
        whole,
        Conversation(prompt, {"tools": tools, "add_generation_prompt": last["role"] == "assistant"}),
    ]


def finish_chat(document: Document, found: Sequence[list[int]]) -> TokenizedDocument:
    """A chat from the ids of its `conversations`.

    Raises:
        DataError: the template has made nothing of it.
    """
    token_ids, *prompts = found
    if not token_ids:
        raise DataError(f"{document.where}: the chat template made no token of it; {MEND}")
    prompt_length = min([len(token_ids), *map(len, prompts)]) if prompts else 0
    return _tokenized(document, token_ids, prompt_length=prompt_length)


def _apply_template(document: Document, tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    from jinja2 import TemplateError

    def applied(messages: list[Message]) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **conversation.options))

    try:
        return applied(conversation.messages)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        plain = [plain_content(message) for message in conversation.messages]
        if plain != conversation.messages:
            with suppress(TemplateError, TypeError, ValueError, KeyError):
                return applied(plain)
        raise DataError(
            f"{document.where}: the chat template refuses the messages: {error}; {MEND}"
        ) from error


def _tokenized(document: Document, token_ids: list[int], *, prompt_length: int) -> TokenizedDocument:
    return TokenizedDocument(
        token_ids=np.array(token_ids, dtype=np.int32),
        prompt_length=prompt_length,
        source=document.source,
        line=document.line,
    )
