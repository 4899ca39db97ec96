"""Small models with each part that is of no family of Hugging Face's, all their numbers drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from plmtune.models.llama import llama
from plmtune.models.pangu_alpha import pangu_alpha
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component

AUGMENTED = component("shortcut", "augmented", reduction=8)
SWIGLU, SIAF = (component("ffn", name, hidden_dim=72) for name in ("swiglu", "siaf"))
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}


def _llama(ffn: Any = SWIGLU, **attention: Any) -> tuple[Callable[..., Decoder], dict[str, Any]]:
    return llama, {"attention": component("attention", "gqa", num_kv_heads=2, **attention), "ffn": ffn}


_PARTS: dict[str, tuple[Callable[..., Decoder], dict[str, Any]]] = {
    "shortcut": _llama(shortcut=AUGMENTED),
    "shortcut of mla": (plm, {
        "attention": component("attention", "mla", **MLA, shortcut=AUGMENTED),
        "ffn": component("ffn", "squared_relu", hidden_dim=72),
    }),
    "siaf": _llama(SIAF),
    "value_embed": _llama(head_dim=10, value_embed=2),
    "query layer": (pangu_alpha, {
        "attention": component("attention", "gqa", num_kv_heads=6, rope=False, bias=True),
        "ffn": component("ffn", "gelu", hidden_dim=72),
    }),
}  # fmt: skip
OWN_PARTS = tuple(_PARTS)
VOCABULARY = 101


def own_model(name: str) -> Decoder:
    """A model of three layers, the context 64."""
    make, parts = _PARTS[name]
    model = make(VOCABULARY, **parts, embed_dim=48, num_layers=3, num_heads=6, max_seq_len=64, init_std=0.2)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for parameter_name, parameter in model.named_parameters():
        if any(part in parameter_name for part in ("shortcut", "series", "bias")):  # they start without an effect
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()
