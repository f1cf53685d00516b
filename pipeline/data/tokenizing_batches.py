"""Many documents to token ids at once, on all cores, with the tokens of `tokenize`.

The library `tokenizers` encodes a batch on all cores without the interpreter's lock. One thread reads and
parses the next documents, a few have batches encoded and take the results apart, and whoever iterates gets
the documents in order. Costs the batches on their way: about eight of `BATCH_CHARACTERS` (more with more
than four cores), or of one document if that is longer. 0.9 us of one core a token (SmolLM2's tokenizer on
prose) and 0.05 us of the interpreter's.

A tokenizer that is not known to do the same in batches, and a document that a batch cannot be made with, go
through `tokenize` itself.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.data.answers import Span, answer_spans, pieces, token_spans
from pipeline.data.documents import Document
from pipeline.data.prefetch import Prefetch
from pipeline.data.tokenizing import (
    TokenizedDocument,
    Tokenizer,
    check_chat,
    end_of_text,
    finish_chat,
    finish_text,
    marks_answers,
    renderer,
    tokenize,
)

BATCH_CHARACTERS = 1 << 19
CORE_CHARACTERS = 1 << 17  # with more cores, more at once: a batch ends when its longest document does
BATCH_DOCUMENTS = 4096
SWITCH_SECONDS = 0.0005  # of the interpreter's lock, which others wait for ten times as long otherwise
READ_BATCHES = 2
ENCODED_BATCHES = 4
ENCODING_THREADS = 3

_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # a key of transformers' own
# What decides about tokens; a tokenizer with one of its own is asked document by document.
_DECIDING = (
    "__call__",
    "encode",
    "_encode_plus",
    "_convert_encoding",
    "apply_chat_template",
    "get_chat_template",
)


def tokenize_all(
    documents: Iterable[Document], tokenizer: Tokenizer, *, mask_prompt: bool = False
) -> Iterator[TokenizedDocument]:
    """`tokenize` over a stream, without transformers' warning about long documents: they are cut later.

    The stream is read on another thread, some batches ahead. What reading or tokenizing raises is raised
    after the documents before it.
    """
    with closing(tokenize_batches(documents, tokenizer, mask_prompt=mask_prompt)) as batches:
        for batch in batches:
            yield from batch


def tokenize_batches(
    documents: Iterable[Document], tokenizer: Tokenizer, *, mask_prompt: bool = False
) -> Generator[list[TokenizedDocument]]:
    """`tokenize_all`, several documents at a time."""
    warned = getattr(tokenizer, "deprecation_warnings", None)
    if isinstance(warned, dict):
        warned[_TOO_LONG] = True
    encode = batch_function(tokenizer)
    if encode is None:
        for document in documents:
            yield [tokenize(document, tokenizer, mask_prompt=mask_prompt)]
        return
    work = _BatchTokenizer(tokenizer, encode, mask_prompt)
    with (
        _switching(),
        closing(Prefetch(_batches(documents), most=READ_BATCHES)) as read,
        ThreadPoolExecutor(ENCODING_THREADS, "tokenize") as pool,
        closing(_ahead(work, read, pool)) as tokenized,
    ):
        for done in tokenized:
            yield done.documents
            if done.error is not None:
                raise done.error


@contextmanager
def _switching() -> Iterator[None]:
    """Threads hand the interpreter on soon, for those that encode need it for moments only."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def batch_function(tokenizer: Tokenizer) -> Callable[..., Sequence[Any]] | None:
    """What encodes a list of texts as `tokenizer` encodes each; None if that is not certain."""
    from transformers import PreTrainedTokenizerFast

    inner = getattr(tokenizer.encode, "__self__", None)  # mlx-lm's wrapper has no `encode` of its own
    if not isinstance(inner, PreTrainedTokenizerFast):
        return None
    if inner is not tokenizer and type(tokenizer).__module__ != "mlx_lm.tokenizer_utils":
        return None
    for name in _DECIDING:
        if getattr(type(inner), name, None) is not getattr(PreTrainedTokenizerFast, name, None):
            return None
        if name in vars(inner) or name in vars(tokenizer):
            return None
    # Leaves the backend without truncation and padding, as every call of `encode` does.
    tokenizer.encode("a")
    backend: Any = inner.backend_tokenizer
    function: Callable[..., Sequence[Any]] = getattr(backend, "encode_batch_fast", backend.encode_batch)
    return function


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of bounded size; those before an error come before it."""
    batch: list[Document] = []
    characters, most = 0, max(BATCH_CHARACTERS, CORE_CHARACTERS * (os.cpu_count() or 1))
    try:
        for document in documents:
            batch.append(document)
            characters += _characters(document)
            if len(batch) >= BATCH_DOCUMENTS or characters >= most:
                yield batch
                batch, characters = [], 0
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _characters(document: Document) -> int:
    return len(document.text) + sum(len(str(message.get("content"))) for message in document.messages)


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """The documents of a batch, up to one that raised an error."""

    documents: list[TokenizedDocument]
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _BatchTokenizer:
    tokenizer: Tokenizer
    encode: Callable[..., Sequence[Any]]
    mask_prompt: bool

    def __call__(self, batch: list[Document]) -> _Tokenized:
        eos = self.tokenizer.eos_token_id
        rendered = [self._rendered(document) for document in batch]
        encoded = self._encoded(batch, rendered)
        found: list[TokenizedDocument] = []
        for document, texts in zip(batch, rendered, strict=True):
            try:
                if texts is None or encoded is None:
                    found.append(tokenize(document, self.tokenizer, mask_prompt=self.mask_prompt))
                    continue
                ids = [next(encoded[document.kind == "text"]).ids for _ in texts]
                if document.kind == "text":
                    assert eos is not None
                    found.append(finish_text(document, ids[0], eos=eos))
                else:
                    found.append(self._chat(document, ids))
            except Exception as error:  # noqa: BLE001 - raised where the documents are taken
                return _Tokenized(found, error)
        return _Tokenized(found)

    def _chat(self, document: Document, ids: list[list[int]]) -> TokenizedDocument:
        whole, *parts = ids
        answers: list[Span] | None = None
        if self.mask_prompt and whole:
            answers = token_spans(whole, parts)
            if answers is None:  # a token reaches from the prompt into the answer
                return tokenize(document, self.tokenizer, mask_prompt=True)
        return finish_chat(document, whole, answers)

    def _rendered(self, document: Document) -> list[str] | None:
        """The texts to encode; None where only `tokenize` can say what is wrong."""
        try:
            if document.kind == "text":
                end_of_text(document, self.tokenizer, mask_prompt=self.mask_prompt)
                return [document.text]
            check_chat(document, self.tokenizer)
            render = renderer(document, self.tokenizer)
            whole = render(list(document.messages))
            if not self.mask_prompt:
                return [whole]
            if marks_answers(self.tokenizer):
                return None
            return [whole, *pieces(whole, answer_spans(document, whole, render))]
        except Exception:  # noqa: BLE001 - templates are programs of strangers
            return None

    def _encoded(
        self, batch: list[Document], rendered: list[list[str] | None]
    ) -> dict[bool, Iterator[Any]] | None:
        """By whether it is plain text, which gets the tokenizer's special tokens: encodings in order."""
        texts: dict[bool, list[str]] = {True: [], False: []}
        for document, found in zip(batch, rendered, strict=True):
            texts[document.kind == "text"] += found or []
        try:
            return {plain: iter(self.encode(some, add_special_tokens=plain)) for plain, some in texts.items()}
        except Exception:  # noqa: BLE001 - the tokenizers library raises bare Exception
            return None


def _ahead(
    work: _BatchTokenizer, batches: Iterator[list[Document]], pool: ThreadPoolExecutor
) -> Generator[_Tokenized]:
    """Results in order, `ENCODED_BATCHES` of them under way; an error of `batches` after those before it."""
    waiting: deque[Future[_Tokenized]] = deque()
    ended: Exception | None = None
    try:
        while True:
            while ended is None and len(waiting) < ENCODED_BATCHES:
                try:
                    waiting.append(pool.submit(work, next(batches)))
                except Exception as error:  # noqa: BLE001 - StopIteration, or raised below
                    ended = error
            if not waiting:
                break
            yield waiting.popleft().result()
        if ended is not None and not isinstance(ended, StopIteration):
            raise ended
    finally:
        for future in waiting:
            future.cancel()
