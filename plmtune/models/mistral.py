"""Mistral and Ministral (arXiv 2310.06825): Llama's form with sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings, read_layer_types, write_layer_types
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "mistral")
def mistral(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=8, head_dim=128, rope_theta=1e4, window=4096),  # noqa: B008
    ffn: Component = component("ffn", "swiglu", hidden_dim=14336),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 4096,
    num_layers: int = 32,
    num_heads: int = 32,
    max_seq_len: int = 32768,
    tie_embeddings: bool = False,
    init_std: float = 0.02,
    layers: list[Literal["global", "local", "nope"]] = ["local"],  # noqa: B006
) -> Decoder:
    """Mistral-7B by default, with its vocabulary of 32,000.

    Args:
        others: as for plm.
        layers: types of layers, repeated; a global layer has no window.
    """
    return assemble("mistral", locals(), layers=layers)


def _read(keys: Keys) -> dict[str, Any]:
    settings = decoder_settings(keys, kv_heads=8, positions=131072)
    window = keys.optional("sliding_window", 4096)
    settings["attention"]["window"] = window
    if keys.model_type == "ministral":
        default = ["sliding_attention" if window is not None else "full_attention"] * settings["num_layers"]
        return settings | {"layers": read_layer_types(keys, default)}
    return settings | {"layers": ["local" if window is not None else "global"]}


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config["attention"]["window"]
    every = "full_attention" if window is None else "sliding_attention"
    types = write_layer_types(config) if "layers" in config else [every]
    keys = decoder_keys(config) | {"sliding_window": window}
    if len(set(types)) > 1:
        return keys | {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "layer_types": types}
    return keys | ({"sliding_window": None} if "full_attention" in types else {})


FAMILY = Family("mistral", {"mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM"}, _read, _write)
