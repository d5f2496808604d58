"""Tiny configurations of every causal architecture that TransformerBridge supports."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

N_LAYERS, N_HEADS, D_HEAD = 3, 4, 8

# sizes by the names that configurations use; each takes those that it knows
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), N_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    "attention_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    "context_length": 128,
    # a window of 6 bites on short prompts
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 6),
    "attention_chunk_size": 6,
    "logit_scale": 0.5,
    "local_attention": 12,
    "query_pre_attn_scalar": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_num_shared_experts"), 2),
    "moe_num_experts": 4,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    "v_head_dim": 8,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    # scans in chunks shorter than the prompts
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
}

# keys and values compressed to a latent vector, with one rotary part of their own
_LATENT: dict[str, Any] = {"qk_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4}
_CONV = ["conv", "full_attention", "conv"]
_MIXED = ["linear_attention", "full_attention", "linear_attention"]

# what a family needs besides, or instead
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_text": {
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 2048,
        "global_head_dim": 8,
    },
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"layer_types": _MIXED, "position_embedding_type": "rope"},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": _CONV},
    "lfm2_moe": {"layer_types": _CONV},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["linear_attention", "moe", "attention"]},
    "youtu": _LATENT,
    "zamba2": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
    },
}


def causal_architectures() -> dict[str, str]:
    """Architecture name to `transformers` model type: what both sides know as a causal model."""
    types: dict[str, list[str]] = defaultdict(list)
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in (names,) if isinstance(names, str) else names:
            types[name].append(model_type)

    def rank(name: str, model_type: str) -> tuple[bool, bool]:
        # several types may share a class: a model's text part, or what the class is named after
        return model_type.endswith("_text"), name.lower().startswith(model_type.replace("_", ""))

    known = [name for name in sorted(SUPPORTED_ARCHITECTURES) if name in types]
    return {name: sorted(types[name], key=partial(rank, name))[-1] for name in known}


def left_out() -> list[str]:
    """Architectures of TransformerBridge that transformers has no causal model class for."""
    return sorted(set(SUPPORTED_ARCHITECTURES) - set(causal_architectures()))


def tiny_config(model_type: str, **special: Any) -> PretrainedConfig:
    """A configuration of `model_type` with three small layers, one of each kind it mixes."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**_sizes(cls(), model_type) | special)


def _sizes(default: PretrainedConfig, model_type: str) -> dict[str, Any]:
    known = default.to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(known.get(name) or ()))
        if kinds:
            sizes[name] = [kinds[i % len(kinds)] for i in range(N_LAYERS)]
    return sizes | EXTRA.get(model_type, {})
