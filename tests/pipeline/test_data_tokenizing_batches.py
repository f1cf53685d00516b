"""Batches give the tokens, the order and the errors of one document at a time; their threads end."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import NewlineTokenizer
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.data import Document, TokenizedDocument, load_documents, tokenize, tokenize_all
from pipeline.data import tokenizing_batches as batches
from pipeline.demo_text import pydoc_topics
from schemas.errors import DataError, PmetalError, UsageError
from tests.pipeline.test_data_tokenizing import STRICT_TEMPLATE, TURNS
from tests.tiny import SPECIAL_TOKENS, save_tokenizer

TEXTS = (
    "A teacher writes.",
    "",
    " ",
    "\n\n\t ",
    "already ended<|im_end|>",
    "<|im_start|>user\nspecial tokens<|im_end|> in <|endoftext|> the text <|im_",
    "naïve café, 東京, 🙂\u200d🙂 e\u0301 \u00e9 \ufeff \u2028 \x00",
    "Der Zug fährt um 12:45 Uhr nach München. " * 300,
)
TOOLS = ({"name": "f", "parameters": {"type": "object"}},)


def save_with_additions(folder: Path) -> None:
    """A tokenizer that begins every text with a token, normalizes, cuts off and pads by itself."""
    save_tokenizer(folder, chat_template=STRICT_TEMPLATE)
    tokenizer = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A", special_tokens=[(SPECIAL_TOKENS[0], 0)]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=24)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=["wrapped", "plain", "wrapped with additions", "plain with additions"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    if "additions" in request.param:
        save_with_additions(folder)
    else:
        save_tokenizer(folder, chat_template=STRICT_TEMPLATE)
    return load_tokenizer(folder) if "wrapped" in request.param else AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 60)
    monkeypatch.setattr(batches, "CORE_CHARACTERS", 1)


def texts(*found: str) -> list[Document]:
    return [Document(kind="text", source="a.jsonl", line=n, text=text) for n, text in enumerate(found, 1)]


def chats() -> list[Document]:
    found = [
        Document(kind="messages", source="b.jsonl", line=turns, messages=TURNS[:turns], tools=tools)
        for turns in (1, 2, 3, 4)
        for tools in (None, TOOLS)
    ]
    found.append(
        Document(
            kind="messages",
            source="b.jsonl",
            line=9,
            messages=(
                {"role": "user", "content": f"{SPECIAL_TOKENS[1]} 🙂"},
                TURNS[1],
                {**TURNS[2], "name": None},
            ),
        )
    )
    return [*found, Document(kind="completion", source="c.jsonl", line=1, messages=TURNS[:2])]


def spelled_out(found: Iterator[TokenizedDocument] | list[TokenizedDocument]) -> list[Any]:
    return [
        (d.token_ids.tolist(), d.token_ids.dtype, d.prompt_length, d.gaps, d.source, d.line) for d in found
    ]


def one_by_one(documents: list[Document], tokenizer: Any, *, mask_prompt: bool = False) -> list[Any]:
    return spelled_out([tokenize(d, tokenizer, mask_prompt=mask_prompt) for d in documents])


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("prefetch", "tokenize"))}


@pytest.mark.parametrize("documents", [texts(*TEXTS), chats(), [*texts(*TEXTS), *chats(), *texts("the end")]])
@pytest.mark.parametrize("size", [1, 60, 10**6])
def test_batches_give_the_same_tokens(
    tokenizer: Any, documents: list[Document], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = one_by_one(documents, tokenizer)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", size)
    monkeypatch.setattr(batches, "CORE_CHARACTERS", 1)
    monkeypatch.setattr(batches, "tokenize", lambda *_, **__: pytest.fail("one by one"))
    assert spelled_out(tokenize_all(iter(documents), tokenizer)) == expected


@pytest.mark.usefixtures("small_batches")
def test_batches_mask_the_same_prompts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [chat for chat in chats() if len(chat.messages) > 1]
    expected = one_by_one(documents, tokenizer, mask_prompt=True)
    assert any(prompt_length and gaps for _, _, prompt_length, gaps, _, _ in expected)
    monkeypatch.setattr(batches, "tokenize", lambda *_, **__: pytest.fail("one by one"))
    assert spelled_out(tokenize_all(documents, tokenizer, mask_prompt=True)) == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    found=st.lists(
        st.lists(
            st.sampled_from([*SPECIAL_TOKENS, " ", "é", "e\u0301", "東", "🙂", "the ", "\n"])
            | st.text(max_size=9)
        )
        .map("".join)
        .filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)),
        min_size=1,
        max_size=12,
    )
)
def test_any_text_gives_the_same_tokens(any_tokenizer: Any, found: list[str]) -> None:
    assert spelled_out(tokenize_all(texts(*found), any_tokenizer)) == one_by_one(texts(*found), any_tokenizer)


@pytest.fixture(scope="module")
def any_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_with_additions(folder)
    return load_tokenizer(folder)


class Spelling:
    """A tokenizer of nobody's, with one token a character."""

    eos_token_id = 2

    def encode(self, text: str) -> list[int]:
        return [3 + ord(c) for c in text]

    def apply_chat_template(self, conversation: list[Any], **options: Any) -> list[int]:
        return self.encode("".join(message["content"] for message in conversation))

    chat_template = "any"


class Backwards(PreTrainedTokenizerFast):  # type: ignore[misc]
    """A fast tokenizer that does something of its own in Python."""

    def _encode_plus(self, text: str, **options: Any) -> Any:
        return super()._encode_plus(text[::-1], **options)


@pytest.mark.parametrize("kind", [Spelling, Backwards, NewlineTokenizer, "changed"])
def test_a_tokenizer_with_ways_of_its_own_is_asked_one_by_one(kind: Any, tmp_path: Path) -> None:
    if kind is Spelling:
        odd = kind()
    elif kind == "changed":
        save_tokenizer(tmp_path)
        odd = load_tokenizer(tmp_path)
        odd.encode = lambda text: [7] * len(text)
    else:
        save_tokenizer(tmp_path, chat_template=STRICT_TEMPLATE)
        odd = kind.from_pretrained(tmp_path)
    assert batches.batch_function(odd) is None
    documents = [*texts("a line\nand another", "b"), *chats()] if kind != "changed" else texts("ab", "cde")
    assert spelled_out(tokenize_all(documents, odd)) == one_by_one(documents, odd)


def taken(documents: Iterator[Document], tokenizer: Any, **options: Any) -> tuple[list[int], PmetalError]:
    """Lines of the documents that came, and the error after them."""
    lines: list[int] = []
    try:
        lines.extend(document.line for document in tokenize_all(documents, tokenizer, **options))
    except PmetalError as error:
        assert not threads()
        return lines, error
    raise AssertionError("no error")


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("bad", [1, 2, 7, 30])
def test_a_record_that_cannot_be_read_is_reported_in_its_turn(
    tokenizer: Any, tmp_path: Path, bad: int
) -> None:
    lines = [json.dumps({"text": f"{n} " + "word " * n}) for n in range(1, 31)]
    lines[bad - 1] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found, error = taken(load_documents(tmp_path / "a.jsonl"), tokenizer)
    assert found == list(range(1, bad))
    assert isinstance(error, DataError)
    assert f"a.jsonl:{bad}: must be one JSON object" in str(error)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("bad", [0, 1, 5, 11])
def test_a_chat_that_the_template_refuses_is_reported_in_its_turn(tokenizer: Any, bad: int) -> None:
    documents = [
        Document(kind="messages", source="b.jsonl", line=n, messages=TURNS[1:] if n == bad else TURNS)
        for n in range(12)
    ]
    with pytest.raises(DataError) as expected:
        tokenize(documents[bad], tokenizer)
    found, error = taken(iter(documents), tokenizer)
    assert found == list(range(bad))
    assert (type(error), str(error)) == (DataError, str(expected.value))


def test_text_in_the_midst_of_masked_chats_is_reported_in_its_turn(tokenizer: Any) -> None:
    documents = [chats()[2], *texts("plain"), chats()[3]]
    found, error = taken(iter(documents), tokenizer, mask_prompt=True)
    assert len(found) == 1
    assert isinstance(error, UsageError)


def test_what_a_batch_cannot_do_is_done_one_by_one(
    any_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(texts: list[str], **_: Any) -> Any:
        raise Exception(f"cannot do {len(texts)} at once")  # as the library raises it

    expected = one_by_one(texts(*TEXTS), any_tokenizer)
    monkeypatch.setattr(batches, "batch_function", lambda _: failing)
    assert spelled_out(tokenize_all(texts(*TEXTS), any_tokenizer)) == expected


@pytest.mark.usefixtures("small_batches")
def test_who_stops_early_stops_the_threads(any_tokenizer: Any) -> None:
    read: list[int] = []
    closed = threading.Event()

    def endless() -> Iterator[Document]:
        try:
            while True:
                read.append(len(read))
                yield Document(kind="text", source="a", line=len(read), text="a teacher writes " * 8)
        finally:
            closed.set()

    found = tokenize_all(endless(), any_tokenizer)
    assert [next(found).line for _ in range(5)] == [1, 2, 3, 4, 5]
    assert threads()
    found.close()  # type: ignore[attr-defined]
    assert not threads()
    ahead = len(read) - 5
    assert ahead <= 1 + batches.READ_BATCHES + batches.ENCODED_BATCHES + 1
    del found
    assert closed.wait(5)


def test_documents_are_read_beside_the_caller(any_tokenizer: Any) -> None:
    names = set()

    def watched() -> Iterator[Document]:
        for document in texts("a", "b"):
            names.add(threading.current_thread().name)
            yield document

    assert len(list(tokenize_all(watched(), any_tokenizer))) == 2
    assert names == {"prefetch"}


@pytest.mark.slow
def test_a_real_tokenizer_gives_the_same_in_batches(real_teacher: Path) -> None:
    """SmolLM2's, on all of Python's manual as text and as chats."""
    tokenizer = load_tokenizer(real_teacher)
    pages = [topic.text for topic in pydoc_topics()]
    plain = texts(*pages)
    chats = [
        Document(
            kind="messages",
            source="b.jsonl",
            line=number,
            messages=({"role": "user", "content": page[:80]}, {"role": "assistant", "content": page[80:]}),
        )
        for number, page in enumerate(pages, 1)
    ]
    assert batches.batch_function(tokenizer) is not None
    for documents, mask_prompt in ((plain, False), (chats, False), (chats, True)):
        found = spelled_out(tokenize_all(documents, tokenizer, mask_prompt=mask_prompt))
        assert found == one_by_one(documents, tokenizer, mask_prompt=mask_prompt)
