"""Qwen3, dense (arXiv 2505.09388): grouped-query attention with normed heads of an explicit width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings, full_attention
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "qwen3")
def qwen3(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=8, head_dim=128, rope_theta=1e6, qk_norm=True),  # noqa: B008
    ffn: Component = component("ffn", "swiglu", hidden_dim=3072),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-6),  # noqa: B008
    embed_dim: int = 1024,
    num_layers: int = 28,
    num_heads: int = 16,
    max_seq_len: int = 40960,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
) -> Decoder:
    """Qwen3-0.6B by default, with its vocabulary of 151,936.

    Arguments as for plm.
    """
    return assemble("qwen3", locals())


def _read(keys: Keys) -> dict[str, Any]:
    full_attention(keys)
    settings = decoder_settings(keys, head_dim=128, kv_heads=32, positions=32768)
    settings["attention"] |= {"qk_norm": True, "bias": keys.get("attention_bias", False)}
    return settings


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_keys(config) | {"attention_bias": config["attention"]["bias"], "use_sliding_window": False}


FAMILY = Family("qwen3", {"qwen3": "Qwen3ForCausalLM"}, _read, _write)
