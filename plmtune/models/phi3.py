"""Phi-3 and Phi-4-mini (arXiv 2404.14219, 2503.01743): Llama's form with fused matrices and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings
from plmtune.models.hf_names import Names
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "phi3")
def phi3(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=32, rope_theta=1e4, window=2047),  # noqa: B008
    ffn: Component = component("ffn", "swiglu", hidden_dim=8192),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 3072,
    num_layers: int = 32,
    num_heads: int = 32,
    max_seq_len: int = 4096,
    tie_embeddings: bool = False,
    init_std: float = 0.02,
) -> Decoder:
    """Phi-3-mini-4k by default, with its vocabulary of 32,064.

    Arguments as for plm.
    """
    return assemble("phi3", locals())


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("attention_bias", False)
    settings = decoder_settings(keys, eps=1e-5, positions=4096, original=4096, share=1, kinds=("default", "longrope"))
    settings["attention"]["window"] = keys.get("sliding_window")
    return settings


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = config["attention"]["rope_scaling"]
    keys = decoder_keys(config) | {"sliding_window": config["attention"]["window"]}
    del keys["head_dim"]
    return keys | {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": scaling.get("original_max_seq_len", config["max_seq_len"]),
    }


_NAMES = Names(
    fused={
        "self_attn.qkv_proj": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "mlp.gate_up_proj": ("ffn.gate_proj", "ffn.up_proj"),
    }
)
FAMILY = Family("phi3", {"phi3": "Phi3ForCausalLM"}, _read, _write, _NAMES)
