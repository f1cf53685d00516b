"""Token strings back to token ids, for servers that answer in text. Costs one decoding of the vocabulary.

A string stands for a token if it is the token's own bytes, or what the tokenizer decodes the token to alone
(as vLLM shows it). A string that stands for several tokens, or has a replacement character in it, maps to
none: guessing would put probabilities on the wrong token.
"""

import re
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_ID_TOKEN = re.compile(r"token_id:(\d{1,8})")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SEVERAL = -1


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A tokenizer's vocabulary by what its tokens look like.

    Attributes:
        by_bytes: UTF-8 of every string that stands for exactly one token -> its id.
    """

    by_bytes: dict[bytes, int]

    @staticmethod
    def of(tokenizer: Any) -> "Vocabulary":
        """The vocabulary of mlx-lm's wrapper or a tokenizer of transformers."""
        names: dict[str, int] = tokenizer.get_vocab()
        ids = sorted(names.values())
        alone = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False)
        special = set(getattr(tokenizer, "all_special_ids", ()))
        raw = _raw_bytes(tokenizer)
        found: dict[bytes, int] = {}
        for token_id, text in zip(ids, alone, strict=True):
            if _REPLACEMENT not in text:
                _add(found, text.encode("utf-8", errors="surrogatepass"), token_id)
        for name, token_id in names.items():
            own = name.encode("utf-8", errors="surrogatepass") if token_id in special else raw(name)
            if own is not None:
                _add(found, own, token_id)
        return Vocabulary({data: i for data, i in found.items() if i != _SEVERAL and data})

    def id_of(self, text: object, data: object = None) -> int | None:
        """The only token that is shown as `text`, or whose bytes are `data` where they are given."""
        named = _ID_TOKEN.fullmatch(text) if isinstance(text, str) else None
        if named:  # vLLM gives the bytes of this string, not of the token
            return int(named.group(1))
        if isinstance(data, list) and all(type(b) is int and 0 <= b < 256 for b in data):
            raw = bytes(data)
            if _REPLACEMENT.encode() not in raw:
                return self.by_bytes.get(raw)
        if not isinstance(text, str) or _REPLACEMENT in text:
            return None
        return self.by_bytes.get(text.encode("utf-8", errors="surrogatepass"))


def _add(found: dict[bytes, int], data: bytes, token_id: int) -> None:
    if found.setdefault(data, token_id) != token_id:
        found[data] = _SEVERAL


def _raw_bytes(tokenizer: Any) -> Any:
    """A function from a token's name in the vocabulary to its bytes, None where that cannot be told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in str(backend.decoder):
        alphabet = _byte_alphabet()

        def byte_level(name: str) -> bytes | None:
            return bytes(alphabet[c] for c in name) if all(c in alphabet for c in name) else None

        return byte_level

    def pieces(name: str) -> bytes | None:
        byte = _BYTE_TOKEN.fullmatch(name)
        return bytes([int(byte.group(1), 16)]) if byte else name.replace("\u2581", " ").encode()

    return pieces


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for the 256 bytes in byte-level BPE (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}
