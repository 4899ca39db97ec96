"""Granite 3 (IBM, 2024): Llama's form with scaled embedding, scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "granite")
def granite(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=8, rope_theta=5e6, scale=0.015625),  # noqa: B008
    ffn: Component = component("ffn", "swiglu", hidden_dim=8192),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 2048,
    num_layers: int = 40,
    num_heads: int = 32,
    max_seq_len: int = 131072,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
    embed_scale: float = 12.0,
    residual_scale: float = 0.22,
    logit_divisor: float = 8.0,
) -> Decoder:
    """Granite-3.1-2B by default, with its vocabulary of 49,155.

    Args:
        others: as for plm.
        embed_scale: multiplies the embedding.
        residual_scale: multiplies what attention and ffn add.
        logit_divisor: logits are divided by it.
    """
    settings = dict(locals())
    logit_scale = 1 / logit_divisor if logit_divisor else 0.0
    return assemble(
        "granite", settings, embed_scale=embed_scale, residual_scale=residual_scale, logit_scale=logit_scale
    )


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("mlp_bias", False)
    settings = decoder_settings(keys, positions=2048)
    settings["attention"] |= {
        "bias": keys.get("attention_bias", False),
        "scale": keys.get("attention_multiplier", 1.0),
    }
    return settings | {
        "embed_scale": keys.get("embedding_multiplier", 1.0),
        "residual_scale": keys.get("residual_multiplier", 1.0),
        "logit_divisor": keys.get("logits_scaling", 1.0),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    attention = config["attention"]
    keys = decoder_keys(config)
    return keys | {
        "attention_bias": attention["bias"],
        "mlp_bias": False,
        "attention_multiplier": keys["head_dim"] ** -0.5 if attention["scale"] is None else attention["scale"],
        "embedding_multiplier": config["embed_scale"],
        "residual_multiplier": config["residual_scale"],
        "logits_scaling": config["logit_divisor"],
    }


FAMILY = Family("granite", {"granite": "GraniteForCausalLM"}, _read, _write)
