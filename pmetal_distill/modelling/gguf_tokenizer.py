"""Rebuilds a Hugging Face tokenizer from the metadata of a GGUF file. Costs about a second at 150k tokens.

Only byte-level BPE (`tokenizer.ggml.model` = gpt2), and only the pre-tokenizers whose rules are known: a
tokenizer that is almost right would give other ids than the teacher was trained on, without a word.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import ModelError

# Token types of llama.cpp.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_UNKNOWN = 2

_GPT2 = ("smollm", "gpt-2", "gpt2")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2",)
_DEFAULT = ("default",)
PRE_TOKENIZERS = (*_GPT2, *_LLAMA3, *_QWEN2, *_DEFAULT)

# The rules as the models' own tokenizer.json files state them.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT, _QWEN2_SPLIT = _CL100K % r"\p{N}{1,3}", _CL100K % r"\p{N}"
# What llama.cpp does where a converter did not know better: four splits, one after the other.
_DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def write_tokenizer(path: Path, metadata: dict[str, Any], folder: Path, *, max_length: int | None) -> int:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        path: the GGUF file, for messages.
        metadata: its metadata.
        folder: where to write.
        max_length: `model_max_length` of the tokenizer.

    Returns:
        number of tokens in the file, unused padding tokens included.

    Raises:
        ModelError: another tokenizer model or pre-tokenizer, or inconsistent lists.
    """
    _require_bpe(path, metadata)
    tokens, types = _read_tokens(path, metadata)
    num_used = _num_used(types)
    tokenizer = _build(path, metadata, tokens[:num_used], types[:num_used])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = _config(path, metadata, tokens[:num_used], max_length)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
    )
    return len(tokens)


def token_id(path: Path, metadata: dict[str, Any], name: str, *, num_tokens: int) -> int | None:
    """The id under `tokenizer.ggml.<name>_token_id`, None if the file names none."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        raise ModelError(
            f"{path}: {key} must be below {num_tokens}, found {value!r}; convert the model again"
        )
    return value


def _require_bpe(path: Path, metadata: dict[str, Any]) -> None:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise ModelError(
            f"{path}: the tokenizer must be a byte-level BPE ('gpt2'), found {model!r}; "
            "use the original model's folder instead of the GGUF file"
        )
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: pre-tokenizer {pre!r} is not known here (known: {', '.join(PRE_TOKENIZERS)}); "
            "use the original model's folder instead of the GGUF file"
        )


def _read_tokens(path: Path, metadata: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(f"{path}: no list tokenizer.ggml.tokens; convert the model again with its tokenizer")
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ModelError(
            f"{path}: tokenizer.ggml.token_type must have {len(tokens)} entries; convert it again"
        )
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{path}: tokenizer.ggml.tokens names a token twice; convert the model again")
    return tokens, types


def _num_used(types: np.ndarray) -> int:
    """Length without the unused tokens at the end, which only pad the embedding."""
    used = np.flatnonzero(types != _UNUSED)
    return int(used[-1]) + 1 if used.size else 0


def _read_merges(path: Path, metadata: dict[str, Any], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelError(f"{path}: no list tokenizer.ggml.merges; convert the model again with its tokenizer")
    pairs = []
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelError(
                f"{path}: merge {index} ({merge!r}) is not made of known tokens; convert the model again"
            )
        pairs.append((left, right))
    return pairs


def _build(path: Path, metadata: dict[str, Any], tokens: list[str], types: np.ndarray) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    pre = metadata["tokenizer.ggml.pre"]
    merges = _read_merges(path, metadata, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    plain = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if _adds_bos(path, metadata):
        _add_bos(path, metadata, tokenizer, tokens)
    return tokenizer


def pre_tokenizer(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if name in _GPT2:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if name != "smollm":
            return byte_level
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    patterns = {**dict.fromkeys(_LLAMA3, (_LLAMA3_SPLIT,)), **dict.fromkeys(_QWEN2, (_QWEN2_SPLIT,))}
    splits = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns.get(name, _DEFAULT_SPLITS)
    ]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _adds_bos(path: Path, metadata: dict[str, Any]) -> bool:
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise ModelError(f"{path}: add_eos_token is not supported; use the original model's folder instead")
    return bool(metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.pre"] in _LLAMA3))


def _add_bos(path: Path, metadata: dict[str, Any], tokenizer: Any, tokens: list[str]) -> None:
    from tokenizers import processors

    bos = token_id(path, metadata, "bos", num_tokens=len(tokens))
    if bos is None:
        raise ModelError(f"{path}: add_bos_token is set, but no bos_token_id; convert the model again")
    name = tokens[bos]
    if name.startswith("$") or ":" in name:  # has a meaning in templates
        raise ModelError(
            f"{path}: add_bos_token with token {name!r}; use the original model's folder instead"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[name, "$A"], pair=[name, "$A", "$B"], special_tokens=[(name, bos)]
    )


def _config(
    path: Path, metadata: dict[str, Any], tokens: list[str], max_length: int | None
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    for name, key in names.items():
        index = token_id(path, metadata, name, num_tokens=len(tokens))
        if index is not None:
            config[key] = tokens[index]
    if max_length is not None:
        config["model_max_length"] = max_length
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config
