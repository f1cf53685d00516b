"""Identities of tokenizers, chat templates and weights. Weights cost one read, about 1 GB/s."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 22
_ADDED_TOKEN_KEYS = ("id", "content", "single_word", "lstrip", "rstrip")
# Settings of a BPE model that play no part if each of the 256 bytes has a token.
_UNKNOWN_KEYS = ("unk_token", "fuse_unk", "byte_fallback")
_NUM_BYTES = 256
# Keys of config.json that say nothing about the function the weights compute.
_CONFIG_ASIDES = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over all that decides which ids a text gets, hex.

    Args:
        tokenizer: mlx-lm's wrapper or a Hugging Face tokenizer.
    """
    return _sha256_json(tokenizer_identity(tokenizer))


def chat_template_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the chat template (of null if there is none), hex."""
    return _sha256_json(getattr(tokenizer, "chat_template", None))


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """All of tokenizer.json that decides ids, in one canonical form.

    Left out is what files of the same tokenizer differ in without giving other ids: truncation and padding
    (per call), the decoder and the flag `special` (for the way back), offsets, and whether an added token is
    listed in the model's vocabulary too.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python: its vocabulary and its class are what can be had
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = json.loads(backend.to_str())
    normalizer = content.get("normalizer")
    added_keys = (*_ADDED_TOKEN_KEYS, "normalized") if normalizer else _ADDED_TOKEN_KEYS
    around = [_around(step) for step in _steps(content.get("post_processor"), "processors")]
    return {
        "vocabulary": backend.get_vocab(with_added_tokens=True),
        "model": _model_identity(content["model"]),
        "normalizer": normalizer,
        "pre_tokenizer": _steps(content.get("pre_tokenizer"), "pretokenizers"),
        "post_processor": [step for step in around if step is not None],
        "added_tokens": [{key: token[key] for key in added_keys} for token in content["added_tokens"]],
    }


def _model_identity(model: dict[str, Any]) -> dict[str, Any]:
    identity = {
        key: value for key, value in model.items() if key != "vocab" and value not in (None, "", False)
    }
    vocabulary = model.get("vocab")
    if model.get("type") == "BPE" and isinstance(vocabulary, dict):
        if sum(len(token) == 1 for token in vocabulary) >= _NUM_BYTES:
            identity = {key: value for key, value in identity.items() if key not in _UNKNOWN_KEYS}
    elif vocabulary is not None:  # Unigram: tokens with their scores
        identity["vocab"] = vocabulary
    return identity


def _around(step: dict[str, Any]) -> Any:
    """What a post-processor puts around a text: the ids before and behind it; None for nothing."""
    if step["type"] == "ByteLevel":
        return None
    if step["type"] != "TemplateProcessing":
        return step
    special = step["special_tokens"]
    pieces = [
        special[piece["SpecialToken"]["id"]]["ids"] if "SpecialToken" in piece else "text"
        for piece in step["single"]
    ]
    return None if pieces == ["text"] else pieces


def _steps(part: dict[str, Any] | None, nested: str) -> list[dict[str, Any]]:
    """A sequence of steps, flattened, without what only moves offsets."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[nested] for step in _steps(inner, nested)]
    return [{key: value for key, value in part.items() if key != "trim_offsets"}]


def compare_tokenizers(first: Any, second: Any, *, limit: int = 5) -> list[str]:
    """Where two tokenizers differ; empty if they give the same ids.

    The size to which a model's embedding is padded plays no part.

    Args:
        first, second: mlx-lm's wrappers or Hugging Face tokenizers.
        limit: of differences named.

    Returns:
        sentences, the most telling first.
    """
    a, b = tokenizer_identity(first), tokenizer_identity(second)
    if a == b:
        return []
    differences = [*_vocabulary_differences(first.get_vocab(), second.get_vocab()), *_part_differences(a, b)]
    return differences[:limit]


def _vocabulary_differences(first: dict[str, int], second: dict[str, int]) -> Iterator[str]:
    if len(first) != len(second):
        yield f"{len(first)} tokens in the one, {len(second)} in the other"
    ids = {token: (first.get(token), second.get(token)) for token in first.keys() | second.keys()}
    differing = [(token, pair) for token, pair in ids.items() if pair[0] != pair[1]]
    for token, (a, b) in sorted(
        differing, key=lambda item: (min(i for i in item[1] if i is not None), item[0])
    ):
        yield f"token {token!r} has id {a} in the one, {b} in the other".replace("id None", "no id")


def _part_differences(first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    for part in sorted(first.keys() | second.keys()):
        a, b = first.get(part), second.get(part)
        if a == b:
            continue
        if part == "model" and isinstance(a, dict) and isinstance(b, dict):
            yield from (
                f"model.{key} differs" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
            )
        else:
            yield f"{part} differs"


def folder_fingerprint(folder: Path, config: dict[str, Any]) -> str:
    """SHA-256 over the weight files in name order and what config.json says of the architecture, hex."""
    digest = hashlib.sha256(_sha256_json(architecture(config)).encode())
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
    return digest.hexdigest()


def tensors_fingerprint(tensors: Iterator[tuple[str, bytes]], config: dict[str, Any]) -> str:
    """SHA-256 over named tensors and what config.json says of the architecture, hex."""
    digest = hashlib.sha256(_sha256_json(architecture(config)).encode())
    for name, data in tensors:
        digest.update(name.encode() + b"\0")
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that says what the weights compute."""
    return {key: value for key, value in config.items() if key not in _CONFIG_ASIDES}


def _sha256_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
