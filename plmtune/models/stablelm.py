"""StableLM 2 (arXiv 2402.17834): Llama's form with layer norm, and RoPE of a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "stablelm")
def stablelm(
    vocab_size: int,
    *,
    attention: Component = component(  # noqa: B008
        "attention", "gqa", num_kv_heads=32, rope_theta=1e4, rope_dim=16, bias=True, output_bias=False
    ),
    ffn: Component = component("ffn", "swiglu", hidden_dim=5632),  # noqa: B008
    norm: Component = component("norm", "layer_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 2048,
    num_layers: int = 24,
    num_heads: int = 32,
    max_seq_len: int = 4096,
    tie_embeddings: bool = False,
    init_std: float = 0.02,
) -> Decoder:
    """StableLM-2-1.6B by default, with its vocabulary of 100,352.

    Arguments as for plm.
    """
    return assemble("stablelm", locals())


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("qk_layernorm", False)
    keys.demand("use_parallel_residual", False)
    settings = decoder_settings(keys, kv_heads=32, positions=4096, share=0.25)
    settings["attention"] |= {"bias": keys.get("use_qkv_bias", False), "output_bias": False}
    settings["norm"] = {"component": "layer_norm", "eps": keys.get("layer_norm_eps", 1e-5)}
    return settings


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"partial_rotary_factor": 1.0} | decoder_keys(config)
    del keys["rms_norm_eps"], keys["head_dim"]
    return keys | {
        "hidden_dropout": 0.0,
        "layer_norm_eps": config["norm"]["eps"],
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "use_qkv_bias": config["attention"]["bias"],
    }


FAMILY = Family("stablelm", {"stablelm": "StableLmForCausalLM"}, _read, _write)
