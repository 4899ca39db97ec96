"""Keys of a GGUF file and settings of a model that most architectures share, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plmtune.errors import UserError
from plmtune.models.gguf_keys import Metadata
from plmtune.models.gguf_layout import kv_heads
from plmtune.models.gguf_rope import read_scaling, rope_width, write_scaling

Config = Mapping[str, Any]
Written = tuple[dict[str, Any], dict[str, Tensor]]
RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


def read_sizes(keys: Metadata) -> dict[str, Any]:
    return {
        "embed_dim": keys.number("embedding_length"),
        "num_layers": keys.number("block_count"),
        "num_heads": keys.number("attention.head_count"),
        "max_seq_len": keys.number("context_length"),
        "tie_embeddings": "output.weight" not in keys.shapes,
    }


def write_sizes(config: Config) -> dict[str, Any]:
    return {
        "context_length": config["max_seq_len"],
        "embedding_length": config["embed_dim"],
        "block_count": config["num_layers"],
        "feed_forward_length": config["ffn"]["hidden_dim"],
        "vocab_size": config["vocab_size"],
        "attention.head_count": config["num_heads"],
    }


def read_gqa(
    keys: Metadata,
    *,
    ffn: str = "swiglu",
    norm: str = "rms_norm",
    partial: bool = False,
    interleaved: bool = False,
    biases: bool = False,
    unit_offset: bool = False,
    freqs: bool = False,
    factors: bool = False,
) -> dict[str, Any]:
    """Settings of a model with grouped-query attention.

    Args:
        partial: RoPE may turn a part of each head.
        interleaved: RoPE turns neighbouring pairs.
        biases: the tensors say whether attention has biases.
        freqs, factors: as for `write_scaling`.
    """
    sizes = read_sizes(keys)
    heads = sizes["num_heads"]
    head_dim = keys.number("attention.key_length", max(1, sizes["embed_dim"] // heads))
    turned = keys.number("rope.dimension_count", head_dim)
    if keys.number("attention.value_length", head_dim) != head_dim or (turned != head_dim and not partial):
        raise UserError(
            f"{keys.path}: keys, values and RoPE of different widths are not supported in a {keys.architecture} model."
        )
    theta = keys.decimal("rope.freq_base", 10000.0)
    attention = {
        "component": "gqa",
        "num_kv_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_interleaved": interleaved,
        "rope_scaling": read_scaling(keys, turned, theta, sizes["max_seq_len"], freqs=freqs, factors=factors),
    }
    if turned != head_dim:
        attention["rope_dim"] = turned
    if biases:
        bias, output = (f"blk.0.{name}.bias" in keys.shapes for name in ("attn_q", "attn_output"))
        attention |= {"bias": bias} | ({"output_bias": output} if output != bias else {})
    eps = keys.decimal(RMS if norm == "rms_norm" else LAYER, 1e-5)
    return sizes | {
        "attention": attention,
        "ffn": {"component": ffn, "hidden_dim": keys.number("feed_forward_length")},
        "norm": {"component": norm, "eps": eps} | ({"unit_offset": True} if unit_offset else {}),
    }


def write_gqa(config: Config, *, freqs: bool = False, factors: bool = False, windows: bool = False) -> Written:
    """The keys of a model with grouped-query attention.

    Args:
        freqs, factors: as for `write_scaling`.
        windows: the architecture has sliding windows.
    """
    attention, longest = config["attention"], config["max_seq_len"]
    head_dim = attention["head_dim"] or config["embed_dim"] // config["num_heads"]
    window = attention.get("window")
    if not windows and window is not None and window < longest and "local" in config.get("layers", ["local"]):
        raise UserError(
            f"llama.cpp ignores the sliding window ({window}) of the model {config['component']}, whose max_seq_len "
            f"is {longest}. Set max_seq_len (max_position_embeddings in config.json) to {window} at most."
        )
    scaling, more = write_scaling(config, freqs=freqs, factors=factors)
    keys = write_sizes(config) | {
        "attention.head_count_kv": kv_heads(config),
        RMS if config["norm"]["component"] == "rms_norm" else LAYER: float(config["norm"]["eps"]),
        "rope.freq_base": float(attention["rope_theta"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": rope_width(config),
    }
    return keys | scaling, more


def write_square_gqa(config: Config, *, factors: bool = False) -> Written:
    width = config["num_heads"] * (config["attention"]["head_dim"] or config["embed_dim"] // config["num_heads"])
    if width != config["embed_dim"]:
        raise UserError(
            f"llama.cpp takes a model {config['component']} with heads as wide as embed_dim ({config['embed_dim']}) in "
            f"all, not {width}."
        )
    return write_gqa(config, factors=factors)
