"""Pieces of text in a row are the text; what cannot be seen is shown."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.reporting.pieces import TokenNames, plain, text_pieces, visible
from tests.tiny import SENTENCES, build_tokenizer


class Wrapped:
    """A tokenizer that decodes lists, as mlx_lm's does."""

    def __init__(self) -> None:
        self.inner = build_tokenizer()

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=False))


class Spaced:
    """Words with a space between, none at the beginning, as sentencepiece decodes."""

    words = ("the", "cat", "sat")

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Wrapped()


@pytest.mark.parametrize("text", [*SENTENCES, "日本語テキスト🙂🙂 ünïcödé", "a\n\n  b\tc"])
def test_pieces_join_to_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.inner.encode(text).ids
    pieces = text_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_stands_at_its_last(tokenizer: Any) -> None:
    ids = tokenizer.inner.encode("a龘b").ids
    assert text_pieces(tokenizer, ids) == ["a", "", "", "龘", "b"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 319), max_size=30))
def test_any_ids_have_as_many_pieces(ids: list[int]) -> None:
    assert len(text_pieces(Wrapped(), ids)) == len(ids)


def test_spaces_between_words_are_kept() -> None:
    assert text_pieces(Spaced(), [0, 1, 2, 0]) == ["the", " cat", " sat", " the"]
    names = TokenNames(Spaced(), 0)
    assert names(1) == "␣cat"


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible(" a\n\t") == "␣a↵⇥"
    assert visible("\u202ex\x1b") == "⟨U+202E⟩x⟨U+001B⟩"
    assert plain("a \n\u202e") == "a \n⟨U+202E⟩"
