"""The architectures of llama.cpp that are read and written: keys of a GGUF file and settings of a model, both ways.

Each architecture says which registered model its files become, how its keys relate to the settings, and how its file
holds the tensors. A model is written as the first architecture whose keys, read again, describe the same computation
(`gguf_match`), so that a setting is written or refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from plmtune.errors import UserError
from plmtune.models.gguf_keys import Metadata
from plmtune.models.gguf_layout import TABLE, Layout
from plmtune.models.gguf_rope import read_latent_scaling, write_latent_scaling
from plmtune.models.gguf_settings import (
    LAYER,
    PATTERN,
    RMS,
    WINDOW,
    Config,
    Written,
    read_gqa,
    read_sizes,
    write_gqa,
    write_sizes,
    write_square_gqa,
)
from plmtune.models.gguf_windows import read_windows, write_windows
from plmtune.models.hf_names import Names


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: general.architecture.
        component: the registered model that its files become.
        parts: components of attention, ffn and norm that it computes.
        read: keys -> settings of the model, without vocab_size and component.
        write: a model's `config` -> keys without the architecture, in order, and tensors that follow from the config.
        layout: of the tensors.
        also: registered models that are written as it first of all.
    """

    name: str
    component: str
    parts: tuple[tuple[str, ...], str, str]
    read: Callable[[Metadata], dict[str, Any]]
    write: Callable[[Config], Written]
    layout: Layout = field(default_factory=Layout)
    also: tuple[str, ...] = ()


_read_llama = partial(read_gqa, freqs=True, biases=True)
_write_llama = partial(write_gqa, freqs=True)
_read_arcee = partial(read_gqa, ffn="squared_relu", freqs=True)
_read_glm = partial(read_gqa, partial=True, interleaved=True, biases=True)


def _read_qwen2(keys: Metadata) -> dict[str, Any]:
    settings = read_gqa(keys)
    settings["attention"] |= {"bias": True, "output_bias": False}
    return settings


def _read_qwen3(keys: Metadata) -> dict[str, Any]:
    settings = read_gqa(keys)
    settings["attention"]["qk_norm"] = True
    return settings


def _read_smollm3(keys: Metadata) -> dict[str, Any]:
    return read_gqa(keys) | {"layers": ["global", "global", "global", "nope"]}  # llama.cpp knows no other


def _read_plm(keys: Metadata) -> dict[str, Any]:
    sizes = read_sizes(keys)
    key_length, turned = keys.number("attention.key_length"), keys.number("rope.dimension_count")
    heads = keys.number("attention.head_count_kv", sizes["num_heads"])
    if heads != sizes["num_heads"]:
        raise UserError(
            f"{keys.path}: {heads} heads of keys and values for {sizes['num_heads']} heads is no PLM model."
        )
    return sizes | {
        "attention": {
            "component": "mla",
            "kv_lora_rank": keys.number("attention.kv_lora_rank"),
            "qk_nope_head_dim": key_length - turned,
            "qk_rope_head_dim": turned,
            "v_head_dim": keys.number("attention.value_length"),
            "rope_theta": keys.decimal("rope.freq_base", 10000.0),
        },
        "ffn": {"component": "squared_relu", "hidden_dim": keys.number("feed_forward_length")},
        "norm": {"component": "rms_norm", "eps": keys.decimal(RMS, 1e-5)},
    }


def _write_plm(config: Config) -> Written:
    if not config["tie_embeddings"]:
        raise UserError(
            "GGUF's architecture plm has no output matrix: its embeddings are tied (tie_embeddings=true). "
            "Use --as deepseek2 or --to hf --as deepseek."
        )
    attention = config["attention"]
    return write_sizes(config) | {
        "attention.head_count_kv": config["num_heads"],
        RMS: float(config["norm"]["eps"]),
        "rope.freq_base": float(attention["rope_theta"]),
        "attention.kv_lora_rank": attention["kv_lora_rank"],
        "attention.key_length": attention["qk_nope_head_dim"] + attention["qk_rope_head_dim"],
        "attention.value_length": attention["v_head_dim"],
        "rope.dimension_count": attention["qk_rope_head_dim"],
    }, {}


def _read_gemma(keys: Metadata) -> dict[str, Any]:
    settings = read_gqa(keys, ffn="geglu", unit_offset=True)
    attention, second = settings["attention"], keys.architecture == "gemma2"
    attention |= {"window": keys.number(WINDOW), "scale": attention["head_dim"] ** -0.5}
    if second:
        attention["soft_cap"] = keys.decimal("attn_logit_softcapping", 50.0)
    else:
        attention["qk_norm"] = True
        settings["local_rope_theta"] = keys.decimal("rope.freq_base_swa", 10000.0)
    period = keys.number(PATTERN, 2 if second else 6)
    cap = keys.decimal("final_logit_softcapping", 30.0) if second else None
    return settings | {"layers": ["local"] * (period - 1) + ["global"], "logit_soft_cap": cap}


def _write_gemma2(config: Config) -> Written:
    keys, tensors = write_gqa(config, windows=True)
    caps = {
        "attn_logit_softcapping": config["attention"]["soft_cap"],
        "final_logit_softcapping": config.get("logit_soft_cap"),
    }
    keys |= {name: float(value) for name, value in caps.items() if value is not None}
    return keys | {WINDOW: config["attention"]["window"]}, tensors


def _write_gemma3(config: Config) -> Written:
    keys, tensors = write_gqa(config, windows=True)
    layers = list(config.get("layers", ["local"]))
    period = layers.index("global") + 1 if "global" in layers else len(layers)
    local = config.get("local_rope_theta") or config["attention"]["rope_theta"]
    return keys | {
        WINDOW: config["attention"]["window"], PATTERN: period, "rope.freq_base_swa": float(local)
    }, tensors  # fmt: skip


def _read_phi3(keys: Metadata) -> dict[str, Any]:
    settings = read_gqa(keys, partial=True, factors=True)
    window = keys.get(WINDOW, 0)  # which llama.cpp ignores
    if window and window < settings["max_seq_len"]:
        raise keys.refuse(WINDOW)
    return settings


def _read_minicpm(keys: Metadata) -> dict[str, Any]:
    settings = read_gqa(keys, freqs=True)
    base = settings["embed_dim"] / keys.decimal("logit_scale")
    depth = keys.decimal("residual_scale") * settings["num_layers"] ** 0.5
    return settings | {
        "embed_scale": keys.decimal("embedding_scale"),
        "depth_scale": float(f"{depth:.6g}"),
        "base_dim": round(base),
    }


def _write_minicpm(config: Config) -> Written:
    keys, tensors = write_gqa(config, freqs=True)
    return keys | {
        "embedding_scale": float(config["embed_scale"]),
        "residual_scale": config["depth_scale"] / config["num_layers"] ** 0.5,
        "logit_scale": config["embed_dim"] / config["base_dim"],
    }, tensors


def _read_granite(keys: Metadata) -> dict[str, Any]:
    settings = _read_llama(keys)
    if scale := keys.decimal("attention.scale", 0.0):
        settings["attention"]["scale"] = scale
    return settings | {
        "embed_scale": keys.decimal("embedding_scale", 1.0),
        "residual_scale": keys.decimal("residual_scale", 1.0),
        "logit_divisor": keys.decimal("logit_scale"),
    }


def _write_granite(config: Config) -> Written:
    keys, tensors = write_gqa(config, freqs=True)
    scale = config["attention"]["scale"]
    return keys | {
        "embedding_scale": float(config["embed_scale"]),
        "residual_scale": float(config["residual_scale"]),
        "logit_scale": float(config["logit_divisor"]),
    } | ({} if scale is None else {"attention.scale": float(scale)}), tensors


def _read_starcoder2(keys: Metadata) -> dict[str, Any]:
    settings = read_gqa(keys, ffn="gelu", norm="layer_norm", biases=True)
    settings["ffn"]["bias"] = "blk.0.ffn_up.bias" in keys.shapes
    return settings


def _read_stablelm(keys: Metadata) -> dict[str, Any]:
    if keys.get("use_parallel_residual", False):
        raise keys.refuse("use_parallel_residual")
    return read_gqa(keys, norm="layer_norm", partial=True, biases=True)


def _write_stablelm(config: Config) -> Written:
    keys, tensors = write_square_gqa(config)
    return keys | {"use_parallel_residual": False}, tensors


def _read_gpt2(keys: Metadata) -> dict[str, Any]:
    sizes = read_sizes(keys)
    return sizes | {
        "attention": {"component": "gqa", "num_kv_heads": sizes["num_heads"], "rope": False, "bias": True},
        "ffn": {"component": "gelu", "hidden_dim": keys.number("feed_forward_length")},
        "norm": {"component": "layer_norm", "eps": keys.decimal(LAYER)},
    }


def _write_gpt2(config: Config) -> Written:
    return write_sizes(config) | {LAYER: float(config["norm"]["eps"])}, {}


def _read_deepseek2(keys: Metadata) -> dict[str, Any]:
    sizes = read_sizes(keys)
    if keys.number("leading_dense_block_count") < sizes["num_layers"]:
        raise keys.refuse("leading_dense_block_count")
    if keys.get("attention.head_count_kv", 1) != 1:
        raise UserError(
            f"{keys.path}: deepseek2.attention.head_count_kv is {keys.get('attention.head_count_kv')!r:.80}: the file "
            "is of an old form, with expanded keys and values. Convert the model again with a newer llama.cpp."
        )
    rank, turned = keys.number("attention.kv_lora_rank"), keys.number("rope.dimension_count")
    # The widths of the latent, which llama.cpp keeps; heads have those of the next two keys.
    widths = keys.number("attention.key_length", rank + turned), keys.number("attention.value_length", rank)
    if widths != (rank + turned, rank):
        raise keys.refuse("attention.key_length")
    keys.get("expert_feed_forward_length")  # of layers with experts, which there are none of
    theta, eps = keys.decimal("rope.freq_base", 10000.0), keys.decimal(RMS)
    return sizes | {
        "attention": {
            "component": "mla",
            "q_lora_rank": keys.get("attention.q_lora_rank") or None,
            "kv_lora_rank": rank,
            "qk_nope_head_dim": keys.number("attention.key_length_mla") - turned,
            "qk_rope_head_dim": turned,
            "v_head_dim": keys.number("attention.value_length_mla"),
            "rope_theta": theta,
            "rope_interleaved": True,
            "rope_scaling": read_latent_scaling(keys, turned, theta, sizes["max_seq_len"]),
            "latent_eps": eps,
        },
        "ffn": {"component": "swiglu", "hidden_dim": keys.number("feed_forward_length")},
        "norm": {"component": "rms_norm", "eps": eps},
    }


def _write_deepseek2(config: Config) -> Written:
    attention = config["attention"]
    rank, turned = attention["kv_lora_rank"], attention["qk_rope_head_dim"]
    return write_sizes(config) | {
        "attention.head_count_kv": 1,
        RMS: float(config["norm"]["eps"]),
        "rope.freq_base": float(attention["rope_theta"]),
        "leading_dense_block_count": config["num_layers"],
        "expert_feed_forward_length": config["ffn"]["hidden_dim"],
        "expert_shared_count": 0,
        "attention.q_lora_rank": attention["q_lora_rank"] or 0,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": attention["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": attention["v_head_dim"],
        "rope.dimension_count": turned,
    } | write_latent_scaling(config), {}


_GQA = ("gqa", "mha")
_LLAMA = (_GQA, "swiglu", "rms_norm")
_GEMMA = (_GQA, "geglu", "rms_norm")
_HEADS = TABLE | {"attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm"}
_POST = TABLE | {"post_attention_norm": "post_attention_norm", "post_ffn_norm": "post_ffw_norm"}
_LATENT = TABLE | {
    "attention.q_a_proj": "attn_q_a", "attention.q_a_norm": "attn_q_a_norm", "attention.q_b_proj": "attn_q_b"
}  # fmt: skip
_QKV = {"attn_qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj")}
_GATE_UP: dict[str, tuple[str, ...]] = {"ffn_up": ("ffn.gate_proj", "ffn.up_proj")}


def _layout(table: Mapping[str, str] = TABLE, fused: Mapping[str, tuple[str, ...]] | None = None, **how: Any) -> Layout:
    return Layout(Names(table, layers="blk.", fused=fused or {}), **how)


ARCHITECTURES = (
    Architecture("plm", "plm", (("mla",), "squared_relu", "rms_norm"), _read_plm, _write_plm),
    Architecture("llama", "llama", _LLAMA, _read_llama, _write_llama, _layout(permuted=True), also=("mistral",)),
    Architecture("qwen2", "qwen2", _LLAMA, _read_qwen2, write_gqa),
    Architecture("qwen3", "qwen3", _LLAMA, _read_qwen3, write_gqa, _layout(_HEADS)),
    Architecture("smollm3", "smollm3", _LLAMA, _read_smollm3, write_gqa, _layout(permuted=True)),
    Architecture("gemma2", "gemma2", _GEMMA, _read_gemma, _write_gemma2, _layout(_POST, unit_offset=True)),
    Architecture("gemma3", "gemma3", _GEMMA, _read_gemma, _write_gemma3, _layout(_POST | _HEADS, unit_offset=True)),
    Architecture(
        "phi3", "phi3", _LLAMA, _read_phi3, partial(write_square_gqa, factors=True), _layout(fused=_GATE_UP | _QKV)
    ),
    Architecture("minicpm", "minicpm", _LLAMA, _read_minicpm, _write_minicpm, _layout(permuted=True)),
    Architecture("granite", "granite", _LLAMA, _read_granite, _write_granite, _layout(permuted=True)),
    Architecture(
        "arcee", "arcee", (_GQA, "squared_relu", "rms_norm"), _read_arcee, _write_llama, _layout(permuted=True)
    ),
    Architecture(
        "granite_swa", "mistral", _LLAMA, read_windows, write_windows, _layout(permuted=True, sinks=True)
    ),
    Architecture("ernie4_5", "ernie4_5", _LLAMA, partial(read_gqa, interleaved=True), write_gqa),
    Architecture("chatglm", "glm", _LLAMA, _read_glm, write_square_gqa, _layout(fused=_GATE_UP)),
    Architecture("starcoder2", "starcoder2", (_GQA, "gelu", "layer_norm"), _read_starcoder2, write_square_gqa),
    Architecture("stablelm", "stablelm", (_GQA, "swiglu", "layer_norm"), _read_stablelm, _write_stablelm),
    Architecture(
        "deepseek2", "deepseek", (("mla",), "swiglu", "rms_norm"), _read_deepseek2, _write_deepseek2,
        _layout(_LATENT, split_latent=True),
    ),
    Architecture(
        "gpt2", "gpt2", (_GQA, "gelu", "layer_norm"), _read_gpt2, _write_gpt2,
        _layout(TABLE | {"pos_embeddings": "position_embd"}, fused=_QKV),
    ),
)  # fmt: skip
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
