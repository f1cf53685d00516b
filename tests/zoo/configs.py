"""A small configuration of every architecture that mlx-lm ships, made of its `ModelArgs`. Costs imports only.

A key of `ModelArgs` that stands in `SMALL` gets the value there, one that stands in `OWN` of the architecture
gets that, and every other keeps its default: a new architecture needs an entry only for what is its own.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import mlx_lm.models

LAYERS, WIDTH, VOCABULARY = 4, 32, 320

SMALL: dict[str, Any] = {
    # width and depth
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"], LAYERS
    ),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "hidden_dim", "model_dim", "block_dim"], WIDTH),
    **dict.fromkeys(["vocab_size", "num_vocab", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["intermediate_size", "n_inner", "ff_intermediate_size", "ffn_hidden_size"], 2 * WIDTH),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "n_ctx", "block_size", "model_max_length"], 512
    ),
    # attention
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups"], 2),
    **dict.fromkeys(["head_dim", "kv_channels", "hidden_size_per_head", "global_head_dim"], 8),
    **dict.fromkeys(["sliding_window", "window_size", "attention_window_size", "sliding_window_size"], 4),
    "sliding_window_pattern": 2,
    **dict.fromkeys(
        ["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "layernorm_epsilon"], 1e-5
    ),
    **dict.fromkeys(["rope_theta", "rope_local_base_freq", "rotary_emb_base", "swa_rope_theta"], 1e4),
    **dict.fromkeys(["partial_rotary_factor", "rotary_pct"], 0.5),
    "rotary_dim": 4,
    "query_pre_attn_scalar": 8,
    **dict.fromkeys(["attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qkv_bias"], False),
    **dict.fromkeys(["use_qk_norm", "qk_norm", "post_norm"], True),
    "tie_word_embeddings": True,
    # latent attention
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank"], 16),
    "qk_rope_head_dim": 4,
    **dict.fromkeys(["qk_nope_head_dim", "v_head_dim"], 8),
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 16,
    # mixtures of experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_top_k", "top_k_experts"], 2
    ),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "num_shared_expert"], 1),
    **dict.fromkeys(
        ["moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"],
        16,
    ),
    **dict.fromkeys(["expert_ffn_hidden_size", "shared_intermediate_size", "share_expert_dim"], 16),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["n_group", "topk_group", "decoder_sparse_step"], 1),
    "norm_topk_prob": True,
    "full_attention_interval": 2,
    "routed_scaling_factor": 1.0,
    "mlp_only_layers": [],
    # state space models and linear attention
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state"], 8),
    **dict.fromkeys(["conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim", "conv1d_width"], 4),
    **dict.fromkeys(["use_conv_bias", "mamba_conv_bias"], True),
    "mamba_proj_bias": False,
    **dict.fromkeys(["mamba_num_heads", "mamba_n_heads"], 8),
    **dict.fromkeys(["mamba_head_dim", "mamba_d_head"], 8),
    **dict.fromkeys(["n_groups", "mamba_n_groups"], 1),
    "mamba_expand": 2,
    "time_step_rank": 4,
    **dict.fromkeys(["linear_num_value_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 32),
    "conv_L_cache": 3,
    "conv_bias": False,
    "layer_group_size": 2,
    "group_norm_size": 1,
    **dict.fromkeys(["a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"], 8),
}
_SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
_GRANITE = {
    "logits_scaling": 8.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_YARN = {
    "type": "yarn",
    "factor": 4,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 128,
}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 2,
    "long_factor": [1.0] * 2,
    "original_max_position_embeddings": 512,
}
_KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 2,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
}
_LLAMA4 = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}
_MROPE = {
    "full_attention_interval": 2,
    "rope_parameters": {
        "type": "default",
        "mrope_section": [1, 1, 0],
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
    },
}

OWN: dict[str, dict[str, Any]] = {
    "llama4": {
        "num_hidden_layers": 8,  # every fourth one is of another kind
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 64,
        "rope_scaling": None,
    },
    "kimi_k3": {
        "linear_attn_config": _KDA,
        "attn_res_block_size": 2,
        "activation_situ_beta": 1.0,
        "activation_situ_linear_beta": 1.0,
    },
    "qwen3_5_moe": _MROPE,
    "qwen3_5": _MROPE,
    "minimax_m3_vl": {"dense_intermediate_size": 64, "moe_layer_freq": [0, 1, 1, 1]},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "final_logit_softcapping": 30.0,
        "layer_types": _SLIDING,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * LAYERS
    },
    "mistral4": {"rope_parameters": {**_ROPE, **_LLAMA4}, "tie_word_embeddings": False},
    "ministral3": {"layer_types": _SLIDING, "rope_parameters": {**_ROPE, **_LLAMA4}},
    "lille-130m": {"n_embd": 64},
    "glm_moe_dsa": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "rope_parameters": _ROPE,
    },
    "deepseek_v2": {"rope_scaling": _YARN},
    "afm7": {"num_kv_reuse_layers": 1},
    "afmoe": {"layer_types": _SLIDING},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2, "tie_word_embeddings": False},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "exaone4": {"layer_types": _SLIDING, "sliding_window_pattern": "LG", "rope_scaling": None},
    "exaone_moe": {"layer_types": _SLIDING, "is_moe_layer": [False, True] * 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    # With "conv_mixer" among them transformers refuses the configuration, and with it the tokenizer.
    "gear": {"layer_types": _SLIDING},
    "gemma4_text": {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "layer_types": _SLIDING},
    "glm4_moe": {"rope_scaling": None},
    "gpt_oss": {"layer_types": _SLIDING},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": {**_GRANITE, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_linear": {"linear_attn_config": _KDA},
    "laguna": {"layer_types": _SLIDING},
    "lfm2": {
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "lfm2_moe": {"use_expert_bias": True, "layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 4,
    },
    "mamba2": {"num_heads": 8, "time_step_limit": (0.001, 100.0)},
    "mellum": {"layer_types": _SLIDING, "rope_parameters": dict.fromkeys(set(_SLIDING), _ROPE)},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0] * 2,
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "minicpm": {"tie_word_embeddings": False, "dim_model_base": 8, "scale_depth": 1.4, "scale_emb": 12.0},
    "minicpm3": {"dim_model_base": 8, "scale_depth": 1.4, "scale_emb": 12.0, "rope_scaling": _LONGROPE},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron_h": {"hybrid_override_pattern": "M*-E"},
    "olmo3": {"layer_types": _SLIDING},
    "olmo_hybrid": {"layer_types": _LINEAR, "linear_allow_neg_eigval": True},
    "openelm": {
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4, 8, 8],
        "num_kv_heads": [2, 2, 4, 4],
        "ffn_multipliers": [1.0, 1.5, 2.0, 2.5],
    },
    "phi3": {"partial_rotary_factor": 1.0},
    "phimoe": {"rope_scaling": None},
    "phixtral": {"rotary_dim": 4},
    "plamo": {"n_shared_head": 2},
    "qwen3_vl_moe": {"tie_word_embeddings": False},
    "qwen": {"kv_channels": 8},
    "recurrent_gemma": {"logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"]},
    "spark2_5": {"layer_types": _SLIDING, "rope_parameters": dict.fromkeys(set(_SLIDING), _ROPE)},
    "step3p5": {"layer_types": _SLIDING},
}
NESTED = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("llama", "ModelArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
"""Wrappers of a language model: the module and the class that their `text_config` is made of."""

ELSEWHERE = {
    "bitnet": "its layers are a Metal kernel, which needs an Apple GPU",
    "muse_spark": "its attention is a Metal kernel, which needs an Apple GPU",
    "olmo": "mlx_lm reads it through the package ai2-olmo, which is not installed",
    "phi3small": "it rules out tokens by number, up to the 100,352nd",
    "prism_hadamard_qwen35": "it exists in packs of 2 bits with widths of 128 and more only",
}
"""What cannot be built small here, and why."""


def architectures() -> list[str]:
    """Every module of `mlx_lm.models` that holds a model, by name, but those of `ELSEWHERE`."""
    folder = Path(mlx_lm.models.__path__[0])
    names = sorted(path.stem for path in folder.glob("*.py"))
    return [
        name
        for name in names
        if name not in ELSEWHERE and "\nclass ModelArgs" in (folder / f"{name}.py").read_text()
    ]


def small_config(name: str) -> dict[str, Any]:
    """A configuration of four layers of width 32."""
    module, kind = NESTED.get(name, (name, "ModelArgs"))
    inside = getattr(importlib.import_module(f"mlx_lm.models.{module}"), kind)
    keys = [field.name for field in dataclasses.fields(inside)]
    own = OWN.get(name, OWN.get(module, {}))
    config = {key: SMALL[key] for key in keys if key in SMALL} | {"model_type": module} | own
    return {"model_type": name, "text_config": config, "vocab_size": VOCABULARY} if name in NESTED else config
