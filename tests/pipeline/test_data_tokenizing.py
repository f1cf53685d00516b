"""Tokenizing: the tokens of mlx-lm's own data sets, for every shape of record."""

import logging
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset
from mlx_lm.utils import load_tokenizer
from transformers import AutoTokenizer

from pipeline.data import Document, tokenize, tokenize_all
from schemas.errors import DataError, ModelError, UsageError
from tests.tiny import CHAT_TEMPLATE, save_tokenizer

STRICT_TEMPLATE = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}"
    "{% if tools %}{{ tools | length }} tools {% endif %}" + CHAT_TEMPLATE
)
TURNS = (
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A student."},
    {"role": "user", "content": "Of whom?"},
    {"role": "assistant", "content": "Of a teacher, 東京."},
)


@pytest.fixture(scope="module", params=["wrapped by mlx-lm", "plain"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, chat_template=STRICT_TEMPLATE)
    return load_tokenizer(folder) if "mlx" in request.param else AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bare_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, chat_template=None)
    return load_tokenizer(folder)


def chat(*messages: dict[str, Any], tools: tuple[Any, ...] | None = None) -> Document:
    return Document(kind="messages", source="a.jsonl", line=3, messages=messages, tools=tools)


@pytest.mark.parametrize("text", ["A teacher writes.", "", "already ended<|im_end|>"])
def test_text_is_what_mlx_lm_trains_on(tokenizer: Any, text: str) -> None:
    tokens = tokenize(Document(kind="text", source="a.txt", text=text), tokenizer)
    expected = [tokenizer.eos_token_id]
    if text:
        expected, _ = TextDataset([], tokenizer).process({"text": text})
    assert tokens.token_ids.tolist() == expected
    assert (tokens.token_ids.dtype, tokens.prompt_length) == ("int32", 0)
    assert (tokens.source, tokens.line) == ("a.txt", 0)


@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("turns", [2, 3, 4])
@pytest.mark.parametrize("tools", [None, ({"name": "f"},)])
def test_chat_is_what_mlx_lm_trains_on(
    tokenizer: Any, mask_prompt: bool, turns: int, tools: tuple[Any, ...] | None
) -> None:
    tokens = tokenize(chat(*TURNS[:turns], tools=tools), tokenizer, mask_prompt=mask_prompt)
    record = {"messages": list(TURNS[:turns]), "tools": list(tools) if tools else None}
    expected, offset = ChatDataset([], tokenizer, mask_prompt=mask_prompt).process(record)
    assert tokens.token_ids.tolist() == expected
    if turns == 2:  # of several answers mlx-lm trains the last, or the user's last words
        assert (tokens.prompt_length, tokens.gaps) == (offset, ())
    assert (tokens.prompt_length > 0) == mask_prompt


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_completion_is_what_mlx_lm_trains_on(tokenizer: Any, mask_prompt: bool) -> None:
    document = Document(kind="completion", source="a.jsonl", line=1, messages=TURNS[:2])
    tokens = tokenize(document, tokenizer, mask_prompt=mask_prompt)
    reference = CompletionsDataset([], tokenizer, "prompt", "completion", mask_prompt)
    expected = reference.process({"prompt": TURNS[0]["content"], "completion": TURNS[1]["content"]})
    assert (tokens.token_ids.tolist(), tokens.prompt_length) == expected


def test_masking_text_is_a_usage_error(tokenizer: Any) -> None:
    document = Document(kind="text", source="a.jsonl", line=5, text="a")
    with pytest.raises(UsageError, match=r"a\.jsonl:5: --mask-prompt needs records with a prompt"):
        tokenize(document, tokenizer, mask_prompt=True)


def test_missing_chat_template_is_a_model_error(bare_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"a\.jsonl:3: chats need a tokenizer with a chat template"):
        tokenize(chat(*TURNS), bare_tokenizer)
    assert len(tokenize(Document(kind="text", source="a", text="a"), bare_tokenizer).token_ids) > 1


def test_refusal_of_the_template_names_the_line(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat template refuses .*a user must begin"):
        tokenize(chat(TURNS[1], TURNS[0]), tokenizer)


def test_content_that_the_template_cannot_join_names_the_line(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat template refuses"):
        tokenize(chat({"role": "user", "content": None}), tokenizer)


def test_tokenizer_without_end_of_text(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-text"):
        tokenize(Document(kind="text", source="a", text="a"), tokenizer)


def test_stream_keeps_order(tokenizer: Any) -> None:
    documents = [Document(kind="text", source="a", line=i, text=f"{i}") for i in range(1, 5)]
    assert [tokens.line for tokens in tokenize_all(iter(documents), tokenizer)] == [1, 2, 3, 4]


def test_long_documents_raise_no_alarm(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("transformers.tokenization_utils_base")
    log.addHandler(caplog.handler)
    try:
        document = Document(kind="text", source="a", text="A teacher writes. " * 400)
        (tokens,) = tokenize_all([document], tokenizer)
    finally:
        log.removeHandler(caplog.handler)
    assert len(tokens.token_ids) > tokenizer.model_max_length
    assert caplog.records == []


CALL = {"function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, ""),
        ({"role": "assistant", "tool_calls": [CALL]}, ""),
        (
            {"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "dog."}]},
            "A dog.",
        ),
        ({"role": "user", "content": ["A ", "dog."]}, "A dog."),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_null_and_parts_are_text_to_a_template_that_takes_strings_only(
    tokenizer: Any, message: dict[str, Any], text: str, batched: bool
) -> None:
    def tokens(second: dict[str, Any]) -> list[int]:
        document = chat(TURNS[0], second)
        found = next(tokenize_all([document], tokenizer)) if batched else tokenize(document, tokenizer)
        return found.token_ids.tolist()

    assert tokens(message) == tokens({**message, "content": text})


def test_parts_that_are_no_text_are_refused(tokenizer: Any) -> None:
    document = chat({"role": "user", "content": [{"type": "image", "image": "a.png"}]})
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat template refuses the messages"):
        tokenize(document, tokenizer)
