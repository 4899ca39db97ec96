"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama's form, with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings, full_attention
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "qwen2")
def qwen2(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=2, rope_theta=1e6, bias=True, output_bias=False),  # noqa: B008
    ffn: Component = component("ffn", "swiglu", hidden_dim=4864),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-6),  # noqa: B008
    embed_dim: int = 896,
    num_layers: int = 24,
    num_heads: int = 14,
    max_seq_len: int = 32768,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
) -> Decoder:
    """Qwen2.5-0.5B by default, with its vocabulary of 151,936.

    Arguments as for plm.
    """
    return assemble("qwen2", locals())


def _read(keys: Keys) -> dict[str, Any]:
    full_attention(keys)
    settings = decoder_settings(keys, kv_heads=32, positions=32768)
    settings["attention"] |= {"bias": True, "output_bias": False}
    return settings


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_keys(config) | {"use_sliding_window": False}


FAMILY = Family("qwen2", {"qwen2": "Qwen2ForCausalLM"}, _read, _write)
