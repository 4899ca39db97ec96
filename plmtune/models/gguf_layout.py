"""Names of tensors and the order of rows in GGUF files, as in llama.cpp's converters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plmtune.modules.gqa import default_kv_heads

# Our names, and those of the format without ".weight".
_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "attention.kv_a_proj": "attn_kv_a_mqa",
    "attention.kv_a_norm": "attn_kv_a_norm",
    "attention.kv_b_proj": "attn_kv_b",
    "ffn.gate_proj": "ffn_gate",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`layers.0.attention.q_proj.weight` -> `blk.0.attn_q.weight`."""
    parts = name.split(".")
    block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return block + _NAMES[".".join(parts[2:-1] if block else parts[:-1])] + f".{parts[-1]}"


def kv_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values that a model's `config` asks for."""
    heads, attention = config["num_heads"], config["attention"]
    if attention["component"] != "gqa":
        return int(heads)
    return int(attention["num_kv_heads"] or default_kv_heads(heads))


def heads_of_halves(config: Mapping[str, Any], name: str) -> int | None:
    """The heads of a tensor whose rows llama.cpp has in another order; None if the order is the same.

    llama.cpp's RoPE rotates neighbours, so its converters put the pairs of a half-split RoPE side by side.
    """
    attention, part = config["attention"], name.split(".")[-2]
    if attention["component"] == "mla" or attention["rope_interleaved"]:
        return None
    return {"q_proj": config["num_heads"], "k_proj": kv_heads(config)}.get(part)


def to_neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows of tensor (Tensor), [heads x width, ...], whose pairs stand side by side, of those with halves."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def to_halves(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `to_neighbours`."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
