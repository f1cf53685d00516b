"""Documents to token ids, with the tokens that `mlx_lm.lora` trains on for the same record.

Text gets the end-of-text token behind it; chats go through the tokenizer's chat template.

References:
    mlx_lm/tuner/datasets.py: TextDataset, ChatDataset, CompletionsDataset.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.documents import MEND, Document, Message
from schemas.errors import DataError, ModelError, UsageError

_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # a key of transformers' own


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
        token_ids, prompt_length = _tokenize_text(document, tokenizer, mask_prompt), 0
    else:
        token_ids, prompt_length = _tokenize_chat(document, tokenizer, mask_prompt)
    return TokenizedDocument(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        prompt_length=prompt_length,
        source=document.source,
        line=document.line,
    )


def tokenize_all(
    documents: Iterable[Document], tokenizer: Tokenizer, *, mask_prompt: bool = False
) -> Iterator[TokenizedDocument]:
    """`tokenize` over a stream, without transformers' warning about long documents: they are cut later."""
    warned = getattr(tokenizer, "deprecation_warnings", None)
    if isinstance(warned, dict):
        warned[_TOO_LONG] = True
    for document in documents:
        yield tokenize(document, tokenizer, mask_prompt=mask_prompt)


def _tokenize_text(document: Document, tokenizer: Tokenizer, mask_prompt: bool) -> list[int]:
    if mask_prompt:
        raise UsageError(
            f"{document.where}: --mask-prompt needs records with a prompt, found plain text; "
            "drop --mask-prompt or give 'messages' or 'prompt' and 'completion'"
        )
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("tokenizer: must have an end-of-text token, found none; set eos_token in its config")
    token_ids = list(tokenizer.encode(document.text))
    if not token_ids or token_ids[-1] != eos:
        token_ids.append(eos)
    return token_ids


def _tokenize_chat(document: Document, tokenizer: Tokenizer, mask_prompt: bool) -> tuple[list[int], int]:
    if not _has_chat_template(tokenizer):
        raise ModelError(
            f"{document.where}: chats need a tokenizer with a chat template, found none; use an instruct "
            "model as teacher, or give plain 'text' records"
        )
    token_ids = _apply_template(document, tokenizer, document.messages)
    if not token_ids:
        raise DataError(f"{document.where}: the chat template made no token of it; {MEND}")
    prompt = document.messages[:-1]
    if not mask_prompt or not prompt:
        return token_ids, 0
    prompt_ids = _apply_template(
        document,
        tokenizer,
        prompt,
        add_generation_prompt=document.messages[-1]["role"] == "assistant",
    )
    return token_ids, min(len(prompt_ids), len(token_ids))


def _has_chat_template(tokenizer: Tokenizer) -> bool:
    wrapped = getattr(tokenizer, "has_chat_template", None)
    return bool(getattr(tokenizer, "chat_template", None) is not None if wrapped is None else wrapped)


def _apply_template(
    document: Document, tokenizer: Tokenizer, messages: Sequence[Message], **options: Any
) -> list[int]:
    from jinja2 import TemplateError

    tools = None if document.tools is None else list(document.tools)
    try:
        return list(tokenizer.apply_chat_template(list(messages), tools=tools, return_dict=False, **options))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{document.where}: the chat template refuses the messages: {error}; {MEND}"
        ) from error
