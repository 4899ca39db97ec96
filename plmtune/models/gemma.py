"""Gemma 2 and 3, text (arXiv 2408.00118, 2503.19786): normed twice, local and global layers, gated by gelu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from plmtune.models.assemble import assemble
from plmtune.models.family import (
    Family,
    Keys,
    decoder_keys,
    decoder_settings,
    need_whole_heads,
    read_layer_types,
    read_rope,
    write_layer_types,
)
from plmtune.models.hf_names import STANDARD, Names
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "gemma2")
def gemma2(
    vocab_size: int,
    *,
    attention: Component = component(  # noqa: B008
        "attention", "gqa", num_kv_heads=4, head_dim=256, rope_theta=1e4, window=4096, soft_cap=50.0, scale=0.0625
    ),
    ffn: Component = component("ffn", "geglu", hidden_dim=9216),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-6, unit_offset=True),  # noqa: B008
    embed_dim: int = 2304,
    num_layers: int = 26,
    num_heads: int = 8,
    max_seq_len: int = 8192,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
    layers: list[Literal["global", "local", "nope"]] = ["local", "global"],  # noqa: B006
    logit_soft_cap: float | None = 30.0,
) -> Decoder:
    """Gemma-2-2B by default, with its vocabulary of 256,000.

    Args:
        others: as for plm.
        layers: types of layers, repeated; a local layer has attention's window.
        logit_soft_cap: logits become cap tanh(logit / cap).
    """
    settings = dict(locals())
    return assemble(
        "gemma2",
        settings,
        layers=layers,
        logit_soft_cap=logit_soft_cap,
        post_norms=True,
        embed_scale=max(embed_dim, 1) ** 0.5,
    )


@register("model", "gemma3")
def gemma3(
    vocab_size: int,
    *,
    attention: Component = component(  # noqa: B008
        "attention", "gqa", num_kv_heads=1, head_dim=256, rope_theta=1e6, window=512, qk_norm=True, scale=0.0625
    ),
    ffn: Component = component("ffn", "geglu", hidden_dim=2048),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-6, unit_offset=True),  # noqa: B008
    embed_dim: int = 640,
    num_layers: int = 18,
    num_heads: int = 4,
    max_seq_len: int = 32768,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
    layers: list[Literal["global", "local", "nope"]] = ["local", "local", "local", "local", "local", "global"],  # noqa: B006
    local_rope_theta: float | None = 10000.0,
    logit_soft_cap: float | None = None,
) -> Decoder:
    """Gemma-3-270M by default, with its vocabulary of 262,144.

    Args:
        others: as for plm.
        layers: types of layers, repeated; a local layer has attention's window.
        local_rope_theta: base of local layers' RoPE; None: as of the global ones.
        logit_soft_cap: logits become cap tanh(logit / cap).
    """
    settings = dict(locals())
    return assemble(
        "gemma3",
        settings,
        layers=layers,
        local_rope_theta=local_rope_theta,
        logit_soft_cap=logit_soft_cap,
        post_norms=True,
        embed_scale=max(embed_dim, 1) ** 0.5,
    )


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("hidden_activation", "gelu_pytorch_tanh")
    # Of old files; transformers reads hidden_activation, layer_types and sliding_window_pattern.
    keys.ignore("hidden_act", "_sliding_window_pattern")
    keys.demand("use_bidirectional_attention", False)
    second = keys.model_type == "gemma2"
    tables = {} if second else keys.get("rope_parameters") or {}
    by_type = "full_attention" in tables and "sliding_attention" in tables
    if tables and (not by_type or keys.get("rope_scaling")):
        raise keys.error("rope_parameters", "must hold full_attention and sliding_attention, without rope_scaling")
    theta = 1e4 if second else 1e6
    positions = 8192 if second else 131072
    settings = decoder_settings(
        keys,
        ffn="geglu",
        tie=True,
        theta=theta,
        head_dim=256,
        kv_heads=4,
        positions=positions,
        rope_table=tables["full_attention"] if by_type else None,
    )
    settings["norm"]["unit_offset"] = True
    period = 2 if second else keys.get("sliding_window_pattern", 6)
    default = [
        "sliding_attention" if (index + 1) % period else "full_attention" for index in range(settings["num_layers"])
    ]
    settings["attention"] |= {
        "bias": keys.get("attention_bias", False),
        "window": keys.optional("sliding_window", 4096),
        "scale": keys.get("query_pre_attn_scalar", 256) ** -0.5,
        "soft_cap": keys.optional("attn_logit_softcapping", 50.0) if second else None,
        "qk_norm": not second,
    }
    settings |= {
        "layers": read_layer_types(keys, default),
        "logit_soft_cap": keys.optional("final_logit_softcapping", 30.0 if second else None),
    }
    if not second:
        keys.ignore("attn_logit_softcapping")  # which transformers' class has and does not apply
        local = read_rope(keys, 1e4, positions=positions, table=tables["sliding_attention"]) if by_type else {}
        settings["local_rope_theta"] = local.get("rope_theta", keys.get("rope_local_base_freq", 1e4))
        if local and local["rope_scaling"] != {"component": "none"}:
            raise keys.error("rope_parameters.sliding_attention", "RoPE scaling of local layers is not supported")
    return settings


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    need_whole_heads(config)
    attention = config["attention"]
    keys = decoder_keys(config) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": attention["bias"],
        "query_pre_attn_scalar": attention["scale"] ** -2 if attention["scale"] else attention["head_dim"],
        "sliding_window": attention["window"],
        "layer_types": write_layer_types(config),
        "attn_logit_softcapping": attention["soft_cap"],
        "final_logit_softcapping": config["logit_soft_cap"],
    }
    scalar = keys["query_pre_attn_scalar"]
    keys["query_pre_attn_scalar"] = round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar
    del keys["hidden_act"]
    if config["component"] == "gemma3":
        keys["rope_local_base_freq"] = config["local_rope_theta"] or attention["rope_theta"]
    return keys


_NAMES = Names(
    {
        **STANDARD.table,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffn_norm": "post_feedforward_layernorm",
    }
)
GEMMA2 = Family("gemma2", {"gemma2": "Gemma2ForCausalLM"}, _read, _write, _NAMES)
FAMILY = Family("gemma3", {"gemma3_text": "Gemma3ForCausalLM"}, _read, _write, _NAMES)
