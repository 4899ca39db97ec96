"""Llama (arXiv 2302.13971, 2407.21783), and what has its form: TinyLlama, SmolLM2 (arXiv 2502.02737)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings, need_whole_heads
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "llama")
def llama(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=3),  # noqa: B008
    ffn: Component = component("ffn", "swiglu", hidden_dim=1536),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 576,
    num_layers: int = 30,
    num_heads: int = 9,
    max_seq_len: int = 8192,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
) -> Decoder:
    """SmolLM2-135M by default (arXiv 2502.02737), with its vocabulary of 49,152.

    Arguments as for plm.
    """
    return assemble("llama", locals())


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("mlp_bias", False)
    settings = decoder_settings(keys, positions=2048)
    settings["attention"]["bias"] = keys.get("attention_bias", False)
    return settings


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    need_whole_heads(config)
    return decoder_keys(config) | {"attention_bias": config["attention"]["bias"], "mlp_bias": False}


FAMILY = Family("llama", {"llama": "LlamaForCausalLM"}, _read, _write)
