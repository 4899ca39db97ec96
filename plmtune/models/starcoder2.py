"""StarCoder2 (arXiv 2402.19173): Llama's form with layer norm, biases, GELU and sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, decoder_keys, decoder_settings
from plmtune.models.hf_names import STANDARD, Names
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "starcoder2")
def starcoder2(
    vocab_size: int,
    *,
    attention: Component = component(  # noqa: B008
        "attention", "gqa", num_kv_heads=2, rope_theta=999999.4420358813, bias=True, window=4096
    ),
    ffn: Component = component("ffn", "gelu", hidden_dim=12288),  # noqa: B008
    norm: Component = component("norm", "layer_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 3072,
    num_layers: int = 30,
    num_heads: int = 24,
    max_seq_len: int = 16384,
    tie_embeddings: bool = True,
    init_std: float = 0.018042,
) -> Decoder:
    """StarCoder2-3B by default, with its vocabulary of 49,152.

    Arguments as for plm.
    """
    return assemble("starcoder2", locals())


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("hidden_act", "gelu_pytorch_tanh", "gelu_new", "gelu")
    settings = decoder_settings(keys, ffn="gelu", tie=True, kv_heads=2, positions=4096)
    bias = keys.get("use_bias", True)
    settings["attention"] |= {"bias": bias, "window": keys.get("sliding_window")}
    exact = keys.get("hidden_act", "gelu_pytorch_tanh") == "gelu"
    settings["ffn"] |= {"bias": bias, "approximate": "none" if exact else "tanh"}
    settings["norm"] = {"component": "layer_norm", "eps": keys.get("norm_epsilon", 1e-5)}
    return settings | {"init_std": keys.get("initializer_range", 0.018042)}


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = decoder_keys(config) | {
        "hidden_act": "gelu_pytorch_tanh" if config["ffn"]["approximate"] == "tanh" else "gelu",
        "norm_epsilon": config["norm"]["eps"],
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "sliding_window": config["attention"]["window"],
        "use_bias": config["attention"]["bias"],
    }
    del keys["rms_norm_eps"]
    return keys


_NAMES = Names({**STANDARD.table, "ffn.up_proj": "mlp.c_fc", "ffn.down_proj": "mlp.c_proj"})
FAMILY = Family("starcoder2", {"starcoder2": "Starcoder2ForCausalLM"}, _read, _write, _NAMES)
