"""PLM (arXiv 2503.12167): latent attention and a squared-ReLU FFN for devices with little memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, read_rope, size_keys, sizes, write_rope
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "plm")
def plm(
    vocab_size: int,
    *,
    attention: Component = component("attention", "mla"),  # noqa: B008
    ffn: Component = component("ffn", "squared_relu"),  # noqa: B008
    norm: Component = component("norm", "rms_norm"),  # noqa: B008
    embed_dim: int = 2048,
    num_layers: int = 32,
    num_heads: int = 16,
    max_seq_len: int = 4096,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
) -> Decoder:
    """PLM-1.8B by default: 1,825,458,176 parameters with its vocabulary of 151,936.

    Args:
        vocab_size: rows of the embedding.
        attention, ffn, norm: the components of each layer.
        embed_dim: width of the residual stream.
        num_layers: layers.
        num_heads: query heads.
        max_seq_len: longest sequence.
        tie_embeddings: the embedding is also the vocabulary projection.
        init_std: standard deviation of the initial matrices. Ours; the paper's is not public.
    """
    return assemble("plm", locals())


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("q_lora_rank", None)
    keys.demand("hidden_act", "relu2")
    keys.demand("attention_bias", False)
    keys.ignore("num_key_value_heads")
    rope = read_rope(keys, 1e5)
    longest = rope.pop("max_seq_len")
    widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {
        "attention": {"component": "mla"} | rope | {name: keys.need(name) for name in widths},
        "ffn": {"component": "squared_relu", "hidden_dim": keys.need("intermediate_size")},
        "norm": {"component": "rms_norm", "eps": keys.get("rms_norm_eps", 1e-6)},
        "num_heads": keys.need("num_attention_heads"),
    } | sizes(keys, longest, tie=True)


def latent_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model with latent attention and PLM's FFN."""
    attention = config["attention"]
    widths = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return (
        size_keys(config)
        | write_rope(attention, config)
        | {
            "num_key_value_heads": config["num_heads"],
            "hidden_act": "relu2",
            "intermediate_size": config["ffn"]["hidden_dim"],
            "rms_norm_eps": config["norm"]["eps"],
            "attention_bias": False,
            "attention_dropout": 0.0,
        }
        | {name: attention[name] for name in widths}
    )


FAMILY = Family("plm", {"plm": "PLMForCausalLM"}, _read, latent_keys, in_transformers=False)
