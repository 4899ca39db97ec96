"""MiniCPM (arXiv 2404.06395): Llama's form with scaled embedding, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "minicpm")
def minicpm(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=36, rope_theta=1e4),  # noqa: B008
    ffn: Component = component("ffn", "swiglu", hidden_dim=5760),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 2304,
    num_layers: int = 40,
    num_heads: int = 36,
    max_seq_len: int = 4096,
    tie_embeddings: bool = True,
    init_std: float = 0.1,
    embed_scale: float = 12.0,
    depth_scale: float = 1.4,
    base_dim: int = 256,
) -> Decoder:
    """MiniCPM-2B by default, with its vocabulary of 122,753.

    Args:
        others: as for plm.
        embed_scale: multiplies the embedding.
        depth_scale: what each layer adds is multiplied by depth_scale / sqrt(num_layers).
        base_dim: logits are multiplied by base_dim / embed_dim.
    """
    settings = dict(locals())
    return assemble(
        "minicpm",
        settings,
        embed_scale=embed_scale,
        residual_scale=depth_scale / max(num_layers, 1) ** 0.5,
        logit_scale=base_dim / max(embed_dim, 1),
    )


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("attention_bias", False)
    settings = decoder_settings(keys, tie=True, positions=2048)
    return settings | {
        "embed_scale": keys.get("scale_emb", 1),
        "depth_scale": keys.get("scale_depth", 1),
        "base_dim": keys.get("dim_model_base", 1),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_keys(config) | {
        "scale_emb": config["embed_scale"],
        "scale_depth": config["depth_scale"],
        "dim_model_base": config["base_dim"],
    }


FAMILY = Family("minicpm", {"minicpm": "MiniCPMForCausalLM"}, _read, _write, in_transformers=False)
