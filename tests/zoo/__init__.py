"""Small random models of many architectures, and what is known of their heads. Costs milliseconds each."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from pmetal_distill.models import LoadedModel, wrap_model
from tests.tiny import random_model, tiny_config
from tests.zoo.configs import small_config

ALTERNATING = ["sliding_attention", "full_attention"] * 2
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

# name -> (configuration, head path, tied, scale, softcap)
SPLIT: dict[str, tuple[dict[str, Any], str, bool, float | None, float | None]] = {
    "llama": ({}, "model.embed_tokens", True, None, None),
    "llama untied": ({"tie": False}, "lm_head", False, None, None),
    "llama windows": (
        {"sliding_window": 4, "layer_types": ALTERNATING},
        "model.embed_tokens",
        True,
        None,
        None,
    ),
    "qwen2": ({}, "model.embed_tokens", True, None, None),
    "qwen3": ({"tie": False}, "lm_head", False, None, None),
    "gemma2": ({}, "model.embed_tokens", True, None, 30.0),
    "gemma3_text": (
        {
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 8,
        },
        "lm_head",
        False,
        None,
        None,
    ),
    "cohere": ({"layer_norm_eps": 1e-5, "logit_scale": 0.0625}, "model.embed_tokens", True, 0.0625, None),
    "cohere2": (
        {
            "layer_norm_eps": 1e-5,
            "layer_norm_bias": False,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "logit_scale": 0.25,
        },
        "model.embed_tokens",
        True,
        0.25,
        None,
    ),
    "granite": (
        {
            "logits_scaling": 8.0,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_bias": False,
            "mlp_bias": False,
        },
        "model.embed_tokens",
        True,
        0.125,
        None,
    ),
    "phi3": ({"rope_scaling": None}, "model.embed_tokens", True, None, None),
    "phi": ({"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5}, "lm_head", False, None, None),
    "minicpm": (
        {"dim_model_base": 8, "scale_depth": 1.4, "scale_emb": 12.0, "tie": False},
        "lm_head",
        False,
        0.25,
        None,
    ),
    "nanochat": ({}, "lm_head", False, None, 15.0),
    "mistral3": ({"text_config": tiny_config()}, "language_model.model.embed_tokens", True, None, None),
    "mixtral": ({"num_local_experts": 4, **MOE}, "model.embed_tokens", True, None, None),
}
UNPACKED: dict[str, dict[str, Any]] = {
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": True,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "gpt2": {
        "n_ctx": 512,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
    },
}
UNSPLIT = ("gpt_neox",)
_made: dict[str, LoadedModel] = {}


def made(name: str) -> LoadedModel:
    """A random model of the tables, or else of `small_config`, made once."""
    if name not in _made:
        tables = {**{key: entry[0] for key, entry in SPLIT.items()}, **UNPACKED}
        own = {"model_type": name.split(" ")[0]}
        config = tiny_config(**own, **tables[name]) if name in tables else small_config(name)
        _made[name] = wrap_model(random_model(config), None, config)
    return _made[name]


def some_tokens(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 320, shape).astype(np.int32))


def array(values: mx.array) -> np.ndarray:
    return np.array(values.astype(mx.float32), np.float64)


def separately(
    model: Any, token_ids: mx.array, documents: np.ndarray, caches: Callable[[], Any] = lambda: None
) -> np.ndarray:
    """The plain call on every document alone, put back together."""
    ids, out = np.array(token_ids), np.zeros((*token_ids.shape, 320))
    for row in range(len(ids)):
        for number in np.unique(documents[row]):
            where = documents[row] == number
            out[row, where] = array(model(mx.array(ids[row, where][None]), cache=caches()))[0]
    return out
