"""Writes small GGUF files for tests: any metadata, any of the five tensor types. Costs milliseconds.

`build_tiny_gguf` writes the llama-architecture file that llama.cpp's converter would make of a tiny model's
folder, so the folder is the reference for what must come out again.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.tiny import build_tiny_model

Parts = tuple[dict[str, Any], dict[str, tuple[str | int, np.ndarray]]]
TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
ALIGNMENT = 32

_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def quantize(values: np.ndarray, kind: str) -> bytes:
    """The bytes of a tensor of type `kind`, blocks of 32 along the last dimension."""
    if kind == "F32":
        return values.astype("<f4").tobytes()
    if kind == "F16":
        return values.astype("<f2").tobytes()
    return b"".join(_block(block, kind) for block in values.reshape(-1, 32).astype(np.float32))


def _block(block: np.ndarray, kind: str) -> bytes:
    if kind == "Q8_0":
        scale = np.float16(np.abs(block).max() / 127)
        return scale.tobytes() + _steps(block, 0, scale, -127, 127).astype(np.int8).tobytes()
    if kind == "Q4_0":
        scale = np.float16(np.abs(block).max() / 7)
        return scale.tobytes() + _pack(_steps(block, 0, scale, -8, 7) + 8)
    low = np.float16(block.min())
    scale = np.float16((block.max() - block.min()) / 15)
    return scale.tobytes() + low.tobytes() + _pack(_steps(block, low, scale, 0, 15))


def _steps(
    block: np.ndarray, low: float | np.floating[Any], scale: np.float16, smallest: int, largest: int
) -> np.ndarray:
    return np.clip(np.round((block - np.float32(low)) / max(float(scale), 1e-8)), smallest, largest)


def _pack(values: np.ndarray) -> bytes:
    numbers = values.astype(np.uint8)
    return (numbers[:16] | (numbers[16:] << 4)).tobytes()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_string(item) for item in value)
    return struct.pack("<IIQ", 9, 5, len(value)) + np.asarray(value, "<i4").tobytes()


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str | int, np.ndarray]]
) -> Path:
    """Writes a GGUF file, version 3.

    Args:
        path: the file.
        metadata: bool, int (as u32), float (as f32), str, list of str, list of int (as i32).
        tensors: name -> (type, values); a type given by number is written without data.
    """
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    data = b""
    for name, (kind, values) in tensors.items():
        number = kind if isinstance(kind, int) else TYPE_NUMBERS[kind]
        head += _string(name) + struct.pack("<I", values.ndim)
        head += struct.pack(f"<{values.ndim}Q", *reversed(values.shape)) + struct.pack(
            "<IQ", number, len(data)
        )
        data += b"" if isinstance(kind, int) else quantize(values, kind)
        data += b"\0" * (-len(data) % ALIGNMENT)
    path.write_bytes(head + b"\0" * (-len(head) % ALIGNMENT) + data)
    return path


def build_origin(path: Path) -> Path:
    """An mlx-lm folder whose matrices have whole blocks of 32 (width 64); padded embedding; untied head."""
    return build_tiny_model(path, hidden_size=64, num_layers=2, vocab_size=328, tokenizer_size=320, tie=False)


def gguf_parts(folder: Path, *, kind: str = "F32", pre: str = "gpt-2") -> Parts:
    """Metadata and tensors of the GGUF file of an mlx-lm folder; matrices of type `kind`, norms F32."""
    config = json.loads((folder / "config.json").read_text())
    return _metadata(folder, config, pre), _tensors(folder, config, kind)


def build_tiny_gguf(path: Path, folder: Path, *, kind: str = "F32", **metadata: Any) -> Path:
    """Writes the GGUF file of an mlx-lm folder; `metadata` overrides keys ('__' for '.'), None drops one."""
    found, tensors = gguf_parts(folder, kind=kind)
    changes = {key.replace("__", "."): value for key, value in metadata.items()}
    return write_gguf(path, {k: v for k, v in (found | changes).items() if v is not None}, tensors)


def _metadata(folder: Path, config: Mapping[str, Any], pre: str) -> dict[str, Any]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    padding = [f"[PAD{index}]" for index in range(len(vocabulary), config["vocab_size"])]
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.context_length": config["max_position_embeddings"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary + padding,
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t in vocabulary] + [5] * len(padding),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["eos_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": settings["chat_template"],
    }


def _tensors(folder: Path, config: Mapping[str, Any], kind: str) -> dict[str, tuple[str | int, np.ndarray]]:
    tensors: dict[str, tuple[str | int, np.ndarray]] = {}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, values in load_file(folder / "model.safetensors").items():
        base, suffix = name.rsplit(".", 1)
        if base in top:
            target = top[base]
        else:
            _, _, layer, part = base.split(".", 3)
            target = f"blk.{layer}.{_BLOCK_NAMES[part]}"
            values = _permute(values, heads.get(_BLOCK_NAMES[part], 0))
        tensors[f"{target}.{suffix}"] = ("F32" if values.ndim == 1 else kind, values)
    return tensors


def _permute(values: np.ndarray, heads: int) -> np.ndarray:
    """Row r of the first half of a head goes to 2r, of the second half to 2r + 1."""
    if not heads:
        return values
    size = values.shape[0] // heads
    order = [
        head * size + row + half * size // 2
        for head in range(heads)
        for row in range(size // 2)
        for half in (0, 1)
    ]
    return values[order]
