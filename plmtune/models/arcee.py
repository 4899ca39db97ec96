"""Arcee's foundation models (AFM): Llama's form with a squared-ReLU FFN, as PLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings, need_whole_heads
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "arcee")
def arcee(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=4, head_dim=128, rope_theta=1e4),  # noqa: B008
    ffn: Component = component("ffn", "squared_relu", hidden_dim=18432),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 2560,
    num_layers: int = 36,
    num_heads: int = 20,
    max_seq_len: int = 4096,
    tie_embeddings: bool = False,
    init_std: float = 0.02,
) -> Decoder:
    """AFM-4.5B by default, before its context is extended by YaRN, with its vocabulary of 128,004.

    Arguments as for plm.
    """
    return assemble("arcee", locals())


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("hidden_act", "relu2")
    keys.demand("mlp_bias", False)
    settings = decoder_settings(keys, ffn="squared_relu", eps=1e-5, positions=4096)
    settings["attention"]["bias"] = keys.get("attention_bias", False)
    return settings


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    need_whole_heads(config)
    return decoder_keys(config) | {
        "attention_bias": config["attention"]["bias"],
        "hidden_act": "relu2",
        "mlp_bias": False,
    }


FAMILY = Family("arcee", {"arcee": "ArceeForCausalLM"}, _read, _write)
