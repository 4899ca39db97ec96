"""SmolLM3: Llama's form, without RoPE in every fourth layer (arXiv 2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings, each_layer_type, full_attention
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "smollm3")
def smollm3(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=4, rope_theta=5e6),  # noqa: B008
    ffn: Component = component("ffn", "swiglu", hidden_dim=11008),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-6),  # noqa: B008
    embed_dim: int = 2048,
    num_layers: int = 36,
    num_heads: int = 16,
    max_seq_len: int = 65536,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
    layers: list[Literal["global", "local", "nope"]] = ["global", "global", "global", "nope"],  # noqa: B006
) -> Decoder:
    """SmolLM3-3B by default, with its vocabulary of 128,256.

    Args:
        others: as for plm.
        layers: types of layers, repeated; a nope layer has no RoPE.
    """
    return assemble("smollm3", locals(), layers=layers)


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("mlp_bias", False)
    full_attention(keys)
    settings = decoder_settings(keys, tie=True, theta=2e6, kv_heads=4, positions=32768)
    settings["attention"]["bias"] = keys.get("attention_bias", False)
    interval = keys.get("no_rope_layer_interval", 4)
    default = [int((index + 1) % interval != 0) for index in range(settings["num_layers"])]
    turned = keys.get("no_rope_layers", default)
    return settings | {"layers": ["global" if flag else "nope" for flag in turned]}


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_keys(config) | {
        "attention_bias": config["attention"]["bias"],
        "mlp_bias": False,
        "use_sliding_window": False,
        "no_rope_layers": [int(kind != "nope") for kind in each_layer_type(config)],
    }


FAMILY = Family("smollm3", {"smollm3": "SmolLM3ForCausalLM"}, _read, _write)
