"""Models and text small enough that each test builds its own."""

from typing import Any

import torch

from plmtune.models.gpt2 import gpt2
from plmtune.models.llama import llama
from plmtune.models.minicpm import minicpm
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component

VOCABULARY = 101
IDS = torch.randint(VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(4))


def small_plm(**settings: Any) -> Decoder:
    """MLA and squared ReLU; the rows of o_proj have 48 numbers, which groups of 32 do not divide."""
    mla = component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
    return _built(plm, attention=mla, ffn=component("ffn", "squared_relu", hidden_dim=96), num_heads=4, **settings)


def small_llama(**settings: Any) -> Decoder:
    """GQA with biases and SwiGLU; embedding and head are two matrices."""
    gqa = component("attention", "gqa", num_kv_heads=2, bias=True)
    settings = {"tie_embeddings": False, "attention": gqa} | settings
    return _built(llama, ffn=component("ffn", "swiglu", hidden_dim=96), num_heads=4, **settings)


def small_valued(**settings: Any) -> Decoder:
    """Value embeddings in the last layer of two."""
    gqa = component("attention", "gqa", num_kv_heads=2, head_dim=32, value_embed=2)
    return small_llama(**{"attention": gqa} | settings)


def small_gpt2() -> Decoder:
    """Learned positions."""
    gqa = component("attention", "gqa", num_kv_heads=4, rope=False, bias=True)
    return _built(gpt2, attention=gqa, ffn=component("ffn", "gelu", hidden_dim=96), num_heads=4)


def small_minicpm() -> Decoder:
    """Scaled embedding, residuals and logits."""
    gqa = component("attention", "gqa", num_kv_heads=2)
    ffn = component("ffn", "swiglu", hidden_dim=96)
    return _built(minicpm, attention=gqa, ffn=ffn, num_heads=4, base_dim=32)


MODELS = {"plm": small_plm, "llama": small_llama}


def _built(make: Any, **settings: Any) -> Decoder:
    settings = {"embed_dim": 64, "num_layers": 2, "max_seq_len": 64, "init_std": 0.15} | settings
    model: Decoder = make(VOCABULARY, **settings).eval()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1, generator=generator)
    return model
