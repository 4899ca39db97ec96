"""Tiny checkpoints of every family, made by transformers, with odd widths and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 6,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_FACTORS = [1.0, 1.5, 2.0, 3.0]
_LONG = {"rope_type": "longrope", "short_factor": _FACTORS, "long_factor": [2 * factor for factor in _FACTORS]}

# A name -> (model_type, keys of config.json besides the sizes).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied-wide": ("llama", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "llama-llama3": ("llama", {"rope_scaling": _LLAMA3, "rope_theta": 500000.0}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama-dynamic": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "llama-yarn": ("llama", {"rope_scaling": _YARN}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 10, "attention_bias": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3-interval": ("smollm3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 10}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "ministral": (
        "ministral",
        {
            "head_dim": 10,
            "sliding_window": 7,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma2": ("gemma2", {"head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 7, "num_hidden_layers": 3}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 7, "num_hidden_layers": 7},
    ),
    "gemma3-scaled": (
        "gemma3_text",
        {
            "head_dim": 10,
            "sliding_window": 5,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3-longrope": (
        "phi3",
        {"rope_scaling": _LONG, "original_max_position_embeddings": 16},
    ),
    "phi4-mini": (
        "phi3",
        {
            "rope_scaling": {**_LONG, "short_factor": _FACTORS[:3], "long_factor": _FACTORS[1:]},
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0, "attention_multiplier": 0.3},
    ),
    "arcee": ("arcee", {"head_dim": 10}),
    "ernie4_5": ("ernie4_5", {"head_dim": 10}),
    "starcoder2": ("starcoder2", {"sliding_window": 7}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "glm": ("glm", {"head_dim": 12}),
    "deepseek_v3": ("deepseek_v3", {**_MLA, "q_lora_rank": 14, "first_k_dense_replace": 2}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {
            **_MLA,
            "q_lora_rank": None,
            "first_k_dense_replace": 2,
            "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        },
    ),
    "deepseek_v2": ("deepseek_v2", {**_MLA, "q_lora_rank": None, "first_k_dense_replace": 2}),
    "youtu": ("youtu", {**_MLA, "q_lora_rank": 14, "rms_norm_eps": 1e-5}),
    "gpt2": (
        "gpt2",
        {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "n_inner": 72},
    ),
}


def config_of(name: str) -> Any:
    """transformers' config of a family."""
    model_type, keys = FAMILIES[name]
    sizes = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(model_type, **({**sizes, **keys} if model_type == "gpt2" else {**SIZES, **keys}))


def make(name: str, directory: Path) -> Any:
    """Save a checkpoint of a family and return transformers' model, in fp32 with eager attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than an initial model's, so that scores, caps and gates are far from linear.
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    transformers.logging.set_verbosity_error()
    model.save_pretrained(directory)
    return model
