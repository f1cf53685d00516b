"""Converts a llama-architecture GGUF file into a folder that mlx-lm loads.

Costs one read of the file and one write of the weights (float32: four bytes a parameter), with one tensor in
memory at a time: 2 s for 135M parameters. Only what maps exactly is converted; the rest is refused by name.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmetal_distill.modelling.folders import new_folder
from pmetal_distill.modelling.gguf_format import GGUFFile, read_gguf
from pmetal_distill.modelling.gguf_tokenizer import token_id, write_tokenizer
from schemas.errors import ModelError, UsageError

ARCHITECTURE = "llama"
RECORD = "conversion.json"
_CONVERTER = 1
_DTYPES = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2")}
_READ_BYTES = 1 << 22

# GGUF name -> mlx-lm name, inside a block.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ATTENTION, _MLP = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")
# Keys that change the computation in a way mlx-lm's llama does not have.
_REFUSED_KEYS = (
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
# Llama 3.1 and 3.2: (factor, low, high, original context) behind the tensor rope_freqs.weight.
_LLAMA3_ROPE = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to write: config.json; per mlx-lm name the GGUF name, shape and heads to un-permute (or 0)."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...], int]]


def convert_gguf(path: str | Path, out_folder: str | Path, *, dtype: str = "float32") -> Path:
    """Converts a GGUF file, or returns the earlier conversion of the same file.

    Args:
        path: a .gguf file: architecture llama, tensors F32, F16, Q8_0, Q4_0 or Q4_1, byte-level BPE.
        out_folder: appears whole or not at all; must be missing, empty, or a conversion of the same bytes.
        dtype: of the weights written, float32 (exact), bfloat16 or float16.

    Returns:
        `out_folder`.

    Raises:
        ModelError: the file is damaged, truncated, or of a kind that is not supported.
        UsageError: the folder is in use, or there is no room for it.
    """
    path, out_folder = Path(path), Path(out_folder)
    if dtype not in _DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(_DTYPES)}, found {dtype!r}")
    gguf = read_gguf(path)
    plan = _plan(gguf)
    record = {"converter": _CONVERTER, "sha256": file_sha256(path), "dtype": dtype}
    if conversion_record(out_folder) == record:
        return out_folder
    _require_room(out_folder, plan, dtype)
    try:
        _write(gguf, plan, record, out_folder)
    except UsageError:
        if conversion_record(out_folder) != record:  # else another process was faster
            raise
    return out_folder


def conversion_record(folder: Path) -> dict[str, Any] | None:
    """What a converted folder says of its origin (`converter`, `sha256`, `dtype`); None for others."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, about 1 GB/s."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _write(gguf: GGUFFile, plan: _Plan, record: dict[str, Any], out_folder: Path) -> None:
    with new_folder(out_folder) as draft:
        max_length = plan.config["max_position_embeddings"]
        num_tokens = write_tokenizer(gguf.path, gguf.metadata, draft, max_length=max_length)
        if num_tokens > plan.config["vocab_size"]:
            raise _refuse(
                gguf, f"{num_tokens} tokens do not fit the {plan.config['vocab_size']} embedding rows"
            )
        (draft / "config.json").write_text(json.dumps(plan.config, indent=2), encoding="utf-8")
        _write_safetensors(draft / "model.safetensors", gguf, plan, record["dtype"])
        (draft / RECORD).write_text(json.dumps(record), encoding="utf-8")


def _write_safetensors(path: Path, gguf: GGUFFile, plan: _Plan, dtype: str) -> None:
    """The safetensors layout: u64 header length, JSON header padded with spaces to 8 bytes, then the data."""
    code, numpy_code = _DTYPES[dtype]
    width = np.dtype(numpy_code).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, (_, shape, _) in plan.tensors.items():
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source, _, heads in plan.tensors.values():
            values = gguf.read(source)
            rows = _unpermute(values, heads)
            rows = _bfloat16_bits(rows) if dtype == "bfloat16" else rows
            file.write(np.ascontiguousarray(rows, numpy_code).data)


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16 (ties to even), uint16, which NumPy has no type for."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # bfloat16 is the upper half. Adding 0x7fff, and one more where the last kept bit is set, rounds it.
    return np.asarray(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16), np.uint16
    )


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of q and k, where the two rope halves of a head alternate."""
    if not heads:
        return rows
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)


def _require_room(out_folder: Path, plan: _Plan, dtype: str) -> None:
    width = np.dtype(_DTYPES[dtype][1]).itemsize
    needed = width * sum(math.prod(shape) for _, shape, _ in plan.tensors.values())
    parent = next(folder for folder in out_folder.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UsageError(
            f"{out_folder}: the converted weights need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "make room or set PMETAL_HOME to a folder on another disk"
        )


def _refuse(
    gguf: GGUFFile, problem: str, advice: str = "use the original model's folder instead"
) -> ModelError:
    return ModelError(f"{gguf.path}: {problem}; {advice}")


def _plan(gguf: GGUFFile) -> _Plan:
    """Checks the metadata and the tensor table against each other."""
    _require_llama(gguf)
    shape = _require_tensor(gguf, "token_embd.weight", None)
    vocab_size, hidden_size = shape if len(shape) == 2 else (0, 0)
    if hidden_size != _integer(gguf, "embedding_length"):
        raise _refuse(gguf, f"token_embd.weight has shape {shape}, embedding_length says otherwise")
    config = _config(gguf, vocab_size=vocab_size, hidden_size=hidden_size)
    tensors = {name: (source, shape, heads) for name, source, shape, heads in _expected_tensors(gguf, config)}
    for source, shape, _ in tensors.values():
        _require_tensor(gguf, source, shape)
    unknown = sorted(
        set(gguf.tensors) - {source for source, _, _ in tensors.values()} - {"rope_freqs.weight"}
    )
    if unknown:
        raise _refuse(
            gguf, f"tensor '{unknown[0]}' has no place in a llama model ({len(unknown)} such tensors)"
        )
    return _Plan(config, tensors)


def _require_llama(gguf: GGUFFile) -> None:
    architecture = gguf.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise _refuse(gguf, f"architecture must be '{ARCHITECTURE}', found {architecture!r}")
    if gguf.metadata.get(f"{ARCHITECTURE}.expert_count"):
        raise _refuse(gguf, "a mixture of experts (expert_count) is not supported")
    if gguf.metadata.get(f"{ARCHITECTURE}.attention.causal") is False:
        raise _refuse(gguf, "attention.causal is false: not a language model")
    for key in _REFUSED_KEYS:
        if gguf.metadata.get(f"{ARCHITECTURE}.{key}"):
            raise _refuse(gguf, f"{ARCHITECTURE}.{key} is not supported")


def _integer(gguf: GGUFFile, key: str, default: int | None = None) -> int:
    value = gguf.metadata.get(f"{ARCHITECTURE}.{key}", default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise _refuse(gguf, f"{ARCHITECTURE}.{key} must be a positive integer, found {value!r}")
    return value


def _number(gguf: GGUFFile, key: str, default: float | None = None) -> float:
    """A positive number; float32 values are given their shortest decimal form."""
    value = gguf.metadata.get(f"{ARCHITECTURE}.{key}", default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _refuse(gguf, f"{ARCHITECTURE}.{key} must be a positive number, found {value!r}")
    return float(str(np.float32(value)))


def _config(gguf: GGUFFile, *, vocab_size: int, hidden_size: int) -> dict[str, Any]:
    heads = _integer(gguf, "attention.head_count")
    head_dim = _integer(gguf, "attention.key_length", hidden_size // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(gguf, key, head_dim) != head_dim:
            raise _refuse(gguf, f"{ARCHITECTURE}.{key} must be the head size {head_dim}")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": _integer(gguf, "block_count"),
        "intermediate_size": _integer(gguf, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(gguf, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _number(gguf, "attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab_size,
        "rope_theta": _number(gguf, "rope.freq_base", 10000.0),
        "max_position_embeddings": _integer(gguf, "context_length"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
    }
    if heads % config["num_key_value_heads"] or head_dim % 2:
        raise _refuse(
            gguf, f"{heads} heads of size {head_dim} with {config['num_key_value_heads']} key heads"
        )
    scaling = _rope_scaling(gguf, head_dim, config["rope_theta"])
    return config | ({"rope_scaling": scaling} if scaling else {}) | _token_ids(gguf, vocab_size)


def _token_ids(gguf: GGUFFile, vocab_size: int) -> dict[str, Any]:
    bos, eos, eot = (
        token_id(gguf.path, gguf.metadata, n, num_tokens=vocab_size) for n in ("bos", "eos", "eot")
    )
    ends = [index for index in dict.fromkeys((eos, eot)) if index is not None]
    ids: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    return {key: value for key, value in ids.items() if value not in (None, [])}


def _rope_scaling(gguf: GGUFFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = gguf.metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "none")
    linear = gguf.metadata.get(f"{ARCHITECTURE}.rope.scale_linear")  # the older key
    if kind not in ("none", "linear"):
        raise _refuse(gguf, f"rope scaling {kind!r} is not supported (none and linear are)")
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, head_dim, theta)
    if kind == "none" and linear in (None, 1.0):
        return None
    factor = _number(gguf, "rope.scaling.factor" if kind == "linear" else "rope.scale_linear")
    return {"rope_type": "linear", "type": "linear", "factor": factor}


def _llama3_scaling(gguf: GGUFFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Finds the settings of Llama 3.1 or 3.2 that give the file's frequency factors."""
    _require_tensor(gguf, "rope_freqs.weight", (head_dim // 2,))
    found = gguf.read("rope_freqs.weight")
    for factor, low, high, context in _LLAMA3_ROPE:
        if np.allclose(found, _llama3_factors(head_dim, theta, factor, low, high, context), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise _refuse(gguf, "rope_freqs.weight holds frequency factors other than those of Llama 3.1 and 3.2")


def _llama3_factors(
    head_dim: int, theta: float, factor: float, low: float, high: float, context: int
) -> np.ndarray:
    """Divisors of the rope frequencies [head_dim / 2]: 1 for short waves, `factor` for long ones."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _expected_tensors(
    gguf: GGUFFile, config: dict[str, Any]
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Yields (mlx-lm name, GGUF name, shape, heads to un-permute)."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", "token_embd.weight", (vocab, width), 0
    yield "model.norm.weight", "output_norm.weight", (width,), 0
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", "output.weight", (vocab, width), 0
    for layer in range(config["num_hidden_layers"]):
        if f"blk.{layer}.attn_norm.weight" not in gguf.tensors:  # ends an absurd block_count early
            raise _refuse(gguf, f"tensor 'blk.{layer}.attn_norm.weight' is missing", "the file is damaged")
        for kind, target in _BLOCK_NAMES.items():
            shape, heads = _block_shape(kind, config)
            yield f"model.layers.{layer}.{target}.weight", f"blk.{layer}.{kind}.weight", shape, heads
            if (config["attention_bias"] and kind in _ATTENTION) or (config["mlp_bias"] and kind in _MLP):
                yield f"model.layers.{layer}.{target}.bias", f"blk.{layer}.{kind}.bias", shape[:1], heads


def _block_shape(kind: str, config: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * config["head_dim"], kv_heads * config["head_dim"]
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "attn_norm": ((width,), 0),
        "attn_q": ((queries, width), heads),
        "attn_k": ((keys, width), kv_heads),
        "attn_v": ((keys, width), 0),
        "attn_output": ((width, queries), 0),
        "ffn_norm": ((width,), 0),
        "ffn_gate": ((inner, width), 0),
        "ffn_up": ((inner, width), 0),
        "ffn_down": ((width, inner), 0),
    }
    return shapes[kind]


def _require_tensor(gguf: GGUFFile, name: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if name not in gguf.tensors:
        raise _refuse(gguf, f"tensor '{name}' is missing", "the file is damaged")
    found = gguf.tensors[name].shape
    if shape is not None and found != shape:
        raise _refuse(gguf, f"tensor '{name}' must have shape {shape}, found {found}", "the file is damaged")
    return found
