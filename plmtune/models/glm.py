"""GLM-4 and GLM-Edge (arXiv 2406.12793): Llama's form, with RoPE of half of each head and a fused FFN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings
from plmtune.models.hf_names import Names
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "glm")
def glm(
    vocab_size: int,
    *,
    attention: Component = component(  # noqa: B008
        "attention",
        "gqa",
        num_kv_heads=2,
        head_dim=128,
        rope_theta=1e4,
        rope_dim=64,
        rope_interleaved=True,
        bias=True,
        output_bias=False,
    ),
    ffn: Component = component("ffn", "swiglu", hidden_dim=13696),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1.5625e-07),  # noqa: B008
    embed_dim: int = 4096,
    num_layers: int = 40,
    num_heads: int = 32,
    max_seq_len: int = 131072,
    tie_embeddings: bool = False,
    init_std: float = 0.02,
) -> Decoder:
    """GLM-4-9B by default, with its vocabulary of 151,552.

    Arguments as for plm.
    """
    return assemble("glm", locals())


def _read(keys: Keys) -> dict[str, Any]:
    settings = decoder_settings(keys, eps=1.5625e-07, head_dim=128, kv_heads=2, positions=131072, share=0.5)
    bias = keys.get("attention_bias", True)
    settings["attention"] |= {"rope_interleaved": True, "bias": bias, "output_bias": False}
    return settings


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"partial_rotary_factor": 1.0} | decoder_keys(config)
    return keys | {"attention_bias": config["attention"]["bias"]}


_NAMES = Names(fused={"mlp.gate_up_proj": ("ffn.gate_proj", "ffn.up_proj")})
FAMILY = Family("glm", {"glm": "GlmForCausalLM"}, _read, _write, _NAMES)
