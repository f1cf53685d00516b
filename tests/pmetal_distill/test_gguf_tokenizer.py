"""Tokenizers out of GGUF files: ids, splits by llama.cpp's rules, special tokens."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from pmetal_distill.gguf import convert_gguf
from pmetal_distill.modelling.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer
from tests.tiny import SENTENCES
from tests.tiny_gguf import build_origin, build_tiny_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_origin(tmp_path_factory.mktemp("origin") / "model")


class TestTokenizer:
    def test_ids_and_template_come_back(self, folder: Path, tmp_path: Path) -> None:
        out = convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out")
        ours, theirs = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (out, folder))
        for text in (*SENTENCES, "<|im_start|>user\nHi 42<|im_end|>", " \n\n\t x"):
            assert ours.encode(text).ids == theirs.encode(text).ids
            assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
        found, expected = (json.loads((path / "tokenizer_config.json").read_text()) for path in (out, folder))
        assert found["chat_template"] == expected["chat_template"]
        assert found["eos_token"] == expected["eos_token"] == "<|im_end|>"

    def test_unused_tokens_at_the_end_only_pad_the_embedding(self, folder: Path, tmp_path: Path) -> None:
        out = convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out")
        assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() == 320
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 328

    def test_bos_is_added_on_request(self, folder: Path, tmp_path: Path) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder, tokenizer__ggml__add_bos_token=True)
        tokenizer = Tokenizer.from_file(str(convert_gguf(path, tmp_path / "out") / "tokenizer.json"))
        assert tokenizer.encode("The fox").ids[0] == 0
        assert tokenizer.encode("The fox", add_special_tokens=False).ids[0] != 0

    def test_an_end_of_turn_token_joins_the_ends(self, folder: Path, tmp_path: Path) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder, tokenizer__ggml__eot_token_id=1)
        config = json.loads((convert_gguf(path, tmp_path / "out") / "config.json").read_text())
        assert config["eos_token_id"] == [2, 1]

    @pytest.mark.parametrize("name", PRE_TOKENIZERS)
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.text(alphabet="abzXÉßñ中の一é '\u2019.,!?$+<|^~-_=\t\n\r 01239٣²½", max_size=40))
    def test_splits_are_those_of_llama_cpp(self, name: str, text: str) -> None:
        found = [piece for piece, _ in pre_tokenizer(name).pre_tokenize_str(text)]
        assert [unbyte(piece) for piece in found] == split_reference(text, name)


SHORT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LONG = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_CPP_RULES = {
    "smollm": [r"\p{N}", SHORT],
    "gpt": [SHORT],
    "llama": [LONG.replace("NUMBER", r"\p{N}{1,3}")],
    "qwen2": [LONG.replace("NUMBER", r"\p{N}")],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", SHORT, r"\p{N}+", r"[0-9][0-9][0-9]"],
}


def split_reference(text: str, name: str) -> list[str]:
    """llama.cpp's way: each rule splits every piece into its matches and what lies between them."""
    rules = next(rules for prefix, rules in LLAMA_CPP_RULES.items() if name.startswith(prefix))
    pieces = [text]
    for rule in rules:
        pieces = [part for piece in pieces for part in matches_and_gaps(rule, piece)]
    return pieces


def matches_and_gaps(rule: str, piece: str) -> list[str]:
    cuts = [0, *(cut for match in regex.finditer(rule, piece) for cut in match.span()), len(piece)]
    return [piece[a:b] for a, b in pairwise(cuts) if a < b]


def unbyte(piece: str) -> str:
    """Undoes the byte-level alphabet of GPT-2: printable bytes stand for themselves, the rest from 256 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return bytes(table[char] for char in piece).decode()
