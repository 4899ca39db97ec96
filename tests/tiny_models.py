"""Models of two layers with random weights, by their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component

_MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
_SIZES = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 64, "init_std": 0.15}


def tiny_plm(rows: int, *, mla: Mapping[str, Any] | None = None, hidden_dim: int = 96, **settings: Any) -> Decoder:
    """MLA and squared ReLU."""
    torch.manual_seed(0)
    attention = component("attention", "mla", **_MLA | dict(mla or {}))
    return plm(rows, attention=attention, ffn=component("ffn", "squared_relu", hidden_dim=hidden_dim),
               **_SIZES | settings)  # fmt: skip


def tiny_llama(rows: int, *, gqa: Mapping[str, Any] | None = None, hidden_dim: int = 96, **settings: Any) -> Decoder:
    """GQA and SwiGLU."""
    torch.manual_seed(0)
    attention = component("attention", "gqa", **{"num_kv_heads": 2} | dict(gqa or {}))
    return llama(rows, attention=attention, ffn=component("ffn", "swiglu", hidden_dim=hidden_dim),
                 **_SIZES | settings)  # fmt: skip
