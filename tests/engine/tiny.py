"""Tiny models with random weights, one per supported model type."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCAB = 128
WINDOW = 6
"""Sliding window of those that have one: much shorter than the test prompts."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough for the two best tokens to lie apart, tied embeddings or not.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# Multi-head latent attention: keys and values of different widths, one per query head.
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
# The last two layers attend to the keys and values of the first two.
_SHARED_KV = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}

MODELS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {},
    "cohere2": _BOTH,
    "deepseek_v2": {**_MLA, **_ROUTED, "head_dim": 8},
    "deepseek_v3": {**_MLA, **_ROUTED, "head_dim": 8},
    "dots1": {**_ROUTED, "head_dim": 16},
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 0,
    },
    "exaone4": _BOTH,
    "exaone_moe": {**_BOTH, **_MOE, "head_dim": 16, "mlp_layer_types": ["dense", "sparse"]},
    "gemma": {"head_dim": 16},
    "gemma2": {
        **_BOTH,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 1.0,  # low enough to bend every score
    },
    "gemma3_text": {**_BOTH, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        **_SHARED_KV,
        "head_dim": 16,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
    },
    "gemma4_text": {
        **_SHARED_KV,
        "head_dim": 16,
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {**_ROUTED, "head_dim": 16},
    "glm4_moe_lite": {**_MLA, **_ROUTED, "head_dim": 8},
    "gpt2": _GPT2,
    "gpt_neox": {},
    "gpt_oss": {**_BOTH, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 16},
    "llama": {},
    "llama4_text": {
        "num_local_experts": 2,
        "head_dim": 16,
        "attention_chunk_size": 256,
        "intermediate_size_mlp": 96,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "ministral3": {"head_dim": 16},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _BOTH,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 256},
    "qwen2": {},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**_MOE, "head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "smollm3": {},
    "solar_open": {**_ROUTED, "head_dim": 16},
    "starcoder2": {"sliding_window": WINDOW},
}
"""What each type needs beyond the common sizes."""

WINDOWED = sorted(name for name, more in MODELS.items() if more.get("sliding_window") == WINDOW)


def tiny_config(model_type: str, **changes: object) -> PreTrainedConfig:
    """The configuration of a tiny model of a type."""
    common = {} if model_type == "gpt2" else _SIZES
    return AutoConfig.for_model(model_type, **{**common, **MODELS[model_type], **changes})
