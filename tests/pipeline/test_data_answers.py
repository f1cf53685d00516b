"""Masked prompts: every answer of a chat is trained, and nothing else, under seven kinds of template."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer
from transformers import AutoTokenizer

from pipeline.data import Document, PackSettings, TokenizedDocument, pack, tokenize, tokenize_all
from pipeline.data import tokenizing_batches as batches
from schemas.errors import DataError
from tests.tiny import save_tokenizer

TEMPLATES = Path(__file__).parents[1] / "templates"
USER = ({"role": "user", "content": "Who are you?"}, {"role": "user", "content": "Of whom? <think>\n"})
PLAIN = ("A student.", "Of a teacher, 東京.")
THOUGHT = ("<think>\nwho\n</think>\n\nA student.", "<think>\nwhom\n</think>\n\nOf a teacher, 東京.")


def of(template: str, folder: Path, *, wrapped: bool = False) -> Any:
    source = (TEMPLATES / f"{template}.jinja").read_text().removesuffix("\n")
    save_tokenizer(folder, chat_template=source)
    return load_tokenizer(folder) if wrapped else AutoTokenizer.from_pretrained(folder)


def chat(answers: tuple[str, ...] = PLAIN, *more: dict[str, Any], **keys: Any) -> Document:
    turns = [
        message
        for asked, said in zip(USER, answers, strict=False)
        for message in (asked, {"role": "assistant", "content": said, **keys})
    ]
    return Document(kind="messages", source="a.jsonl", line=3, messages=(*turns, *more))


def trained(document: TokenizedDocument, tokenizer: Any) -> list[str]:
    """Text of each run of tokens that is predicted in training, by way of the packed masks."""
    packed = pack([document], PackSettings(max_seq_len=4096)).sequence(0)
    wanted = np.concatenate([[0], packed.loss_mask[:-1], [0]])
    edges = (1 + np.flatnonzero(np.diff(wanted))).tolist()
    ids = packed.token_ids.tolist()
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


FIRST, SECOND = PLAIN
EMPTY = "<think>\n\n</think>\n\n"
CASES = [
    ("chatml", False, PLAIN, [f"{FIRST}<|im_end|>\n", f"{SECOND}<|im_end|>\n"]),
    ("llama3", False, PLAIN, [f"{FIRST}<|eot_id|>", f"{SECOND}<|eot_id|>"]),
    ("mistral", False, PLAIN, [f" {FIRST}<|im_end|>", f" {SECOND}<|im_end|>"]),
    ("gemma", False, PLAIN, [f"{FIRST}<end_of_turn>\n", f"{SECOND}<end_of_turn>\n"]),
    ("marked", False, PLAIN, [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]),
    ("marked", True, PLAIN, [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]),
    # The generation prompt opens a thinking block; renderings of past turns have none.
    ("r1", False, PLAIN, [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]),
    ("r1", False, ("<b>yes", "<think about it"), ["<b>yes<|im_end|>", "<think about it<|im_end|>"]),
    ("r1", False, THOUGHT, [f"\n\n{FIRST}<|im_end|>", f"\n\n{SECOND}<|im_end|>"]),
    # Thinking of the last turn only; mlx-lm's wrapper turns it off for a tokenizer without its tokens.
    ("qwen3", False, PLAIN, [f"{FIRST}<|im_end|>\n", f"{EMPTY}{SECOND}<|im_end|>\n"]),
    ("qwen3", False, THOUGHT, [f"{FIRST}<|im_end|>\n", f"{THOUGHT[1]}<|im_end|>\n"]),
    ("qwen3", True, PLAIN, [f"{FIRST}<|im_end|>\n", f"{SECOND}<|im_end|>\n"]),
]


@pytest.mark.parametrize(("template", "wrapped", "answers", "expected"), CASES)
def test_every_answer_is_trained(
    template: str, wrapped: bool, answers: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    tokenizer = of(template, tmp_path, wrapped=wrapped)
    document = chat(answers)
    one = tokenize(document, tokenizer, mask_prompt=True)
    assert trained(one, tokenizer) == expected
    assert one.token_ids.tolist() == tokenize(document, tokenizer).token_ids.tolist()
    # A question after the last answer is not trained, and changes no answer before it.
    longer = tokenize(chat(answers, USER[0]), tokenizer, mask_prompt=True)
    without_thoughts = [
        text.removeprefix(EMPTY).removeprefix("<think>\nwhom\n</think>\n\n") for text in expected
    ]
    assert trained(longer, tokenizer) == (without_thoughts if template == "qwen3" else expected)
    # One answer: the prompt is the beginning, as ever.
    if template != "marked":  # whose marks end before the last line break
        assert tokenize(chat(answers[:1]), tokenizer, mask_prompt=True).gaps == ()


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "gemma", "r1", "qwen3", "marked"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_batches_find_the_same_answers(
    template: str, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = of(template, tmp_path, wrapped=wrapped)
    documents = [chat(answers, *more) for answers in (PLAIN, THOUGHT, PLAIN[:1]) for more in ((), USER[:1])]
    expected = [tokenize(document, tokenizer, mask_prompt=True) for document in documents]
    if template != "marked":  # whose marks only transformers can read, one chat at a time
        monkeypatch.setattr(batches, "tokenize", lambda *_, **__: pytest.fail("one by one"))
    found = list(tokenize_all(documents, tokenizer, mask_prompt=True))
    for a, b in zip(expected, found, strict=True):
        assert (a.token_ids.tolist(), a.prompt_length, a.gaps) == (
            b.token_ids.tolist(),
            b.prompt_length,
            b.gaps,
        )


def test_thoughts_and_calls_of_tools_are_trained(tmp_path: Path) -> None:
    tokenizer = of("qwen3", tmp_path)
    calls = [{"name": "look"}, {"name": "tell"}]
    called = '<tool_call>\n{"name": "look"}\n</tool_call>\n<tool_call>\n{"name": "tell"}\n</tool_call>'
    messages = (
        USER[0],
        {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "a cat"},
        {"role": "assistant", "content": "A cat.", "reasoning_content": "Seen."},
        USER[1],
        {"role": "assistant", "content": "Of a cat."},
    )
    cut = Document(kind="messages", source="a.jsonl", line=3, messages=messages[:4])
    assert trained(tokenize(cut, tokenizer, mask_prompt=True), tokenizer) == [
        f"<think>\nI look.\n</think>\n\n{called}<|im_end|>\n",
        "<think>\nSeen.\n</think>\n\nA cat.<|im_end|>\n",
    ]
    whole = Document(kind="messages", source="a.jsonl", line=3, messages=messages)
    assert trained(tokenize(whole, tokenizer, mask_prompt=True), tokenizer) == [
        f"{called}<|im_end|>\n",
        "A cat.<|im_end|>\n",
        f"{EMPTY}Of a cat.<|im_end|>\n",
    ]


def test_a_token_that_reaches_over_an_edge_belongs_to_the_answer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = ("the f", "orest and the f", "orest.")
    roles = ("user", "assistant", "user")
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, words, strict=True))
    document = Document(kind="messages", source="a.jsonl", messages=messages)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("".join(words), add_special_tokens=False)]
    assert pieces.count(" fo") == 2  # one token, half question, half answer
    one = tokenize(document, tokenizer, mask_prompt=True)
    assert trained(one, tokenizer) == [" forest and the fo"]
    (two,) = tokenize_all([document], tokenizer, mask_prompt=True)
    assert (one.prompt_length, one.gaps) == (two.prompt_length, two.gaps)


@pytest.mark.parametrize("template", ["{{ messages | length }} messages", "{{ messages[-1]['content'] }}"])
def test_a_template_without_boundaries_names_the_record(template: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl:3: --mask-prompt needs .* messages\[1\] begins and ends"):
        tokenize(chat(), tokenizer, mask_prompt=True)
    with pytest.raises(DataError, match=r"a\.jsonl:3: --mask-prompt needs .* messages\[1\] begins and ends"):
        list(tokenize_all([chat()], tokenizer, mask_prompt=True))


def test_a_chat_without_answers_names_the_record(tmp_path: Path) -> None:
    document = Document(kind="messages", source="a.jsonl", line=3, messages=USER[:1])
    with pytest.raises(DataError, match=r"a\.jsonl:3: .* role is 'assistant', found only 'user'"):
        tokenize(document, of("chatml", tmp_path), mask_prompt=True)
