"""Token ids to pieces of text that give the text when put in a row. Costs two short decodes a token."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def text_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of every token in its place; "" for a token that only begins a character.

    Decoding a token alone would lose the spaces that some tokenizers put between tokens and show parts of
    characters, so each is decoded behind the ones before it.

    Args:
        tokenizer: has `decode`.
        token_ids: of one text.
    """
    pieces: list[str] = []
    context, start = 0, 0  # what stands before the open tokens; the first of these
    for stop in range(1, len(token_ids) + 1):
        before = tokenizer.decode(list(token_ids[context:start])) if start else ""
        whole = tokenizer.decode(list(token_ids[context:stop]))
        if whole.endswith(_UNFINISHED) and stop - start < _LONGEST_CHARACTER:
            pieces.append("")
            continue
        pieces.append(whole[len(before) :])
        context, start = start, stop
    return pieces


@dataclass(slots=True, eq=False)
class TokenNames:
    """Single tokens as text in which white space and control characters can be seen.

    Args:
        tokenizer: has `decode`.
        anchor: a token to decode behind, so that a leading space is not lost.
    """

    tokenizer: Any
    anchor: int
    _known: dict[int, str] = field(default_factory=dict)

    def __call__(self, token_id: int) -> str:
        """The name of a token."""
        if token_id not in self._known:
            before = self.tokenizer.decode([self.anchor])
            text = self.tokenizer.decode([self.anchor, token_id])
            piece = text[len(before) :] if text.startswith(before) else self.tokenizer.decode([token_id])
            self._known[token_id] = visible(piece) or f"#{token_id}"
        return self._known[token_id]


def visible(text: str) -> str:
    """Text with white space, control and direction characters shown as symbols or code points."""
    return "".join(_shown(character) for character in text)


def plain(text: str) -> str:
    """Text with line breaks and tabs kept and other control and direction characters shown as code points."""
    return "".join(c if c in _VISIBLE else _shown(c) for c in text)


def _shown(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    hidden = (
        unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"
    )
    return f"⟨U+{ord(character):04X}⟩" if hidden else character
