"""ERNIE 4.5, dense (Baidu, 2025): Llama's form, with RoPE of neighbouring pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "ernie4_5")
def ernie4_5(
    vocab_size: int,
    *,
    attention: Component = component(  # noqa: B008
        "attention", "gqa", num_kv_heads=2, head_dim=128, rope_theta=5e5, rope_interleaved=True
    ),
    ffn: Component = component("ffn", "swiglu", hidden_dim=3072),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 1024,
    num_layers: int = 18,
    num_heads: int = 16,
    max_seq_len: int = 131072,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
) -> Decoder:
    """ERNIE-4.5-0.3B by default, with its vocabulary of 103,424.

    Arguments as for plm.
    """
    return assemble("ernie4_5", locals())


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("use_bias", False)
    settings = decoder_settings(keys, tie=True, eps=1e-5, theta=5e5, head_dim=128, kv_heads=2, positions=131072)
    settings["attention"]["rope_interleaved"] = True
    return settings


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = decoder_keys(config) | {"use_bias": False}
    del keys["attention_dropout"]
    return keys


FAMILY = Family("ernie4_5", {"ernie4_5": "Ernie4_5ForCausalLM"}, _read, _write)
