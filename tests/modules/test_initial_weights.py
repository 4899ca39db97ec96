"""The standard deviations that a model's matrices start with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component, load

MLA = component("attention", "mla", kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
MODELS = {
    "plm": (plm, MLA, component("ffn", "squared_relu", hidden_dim=192)),
    "llama": (llama, component("attention", "gqa", num_kv_heads=2), component("ffn", "swiglu", hidden_dim=192)),
}
# layers, layer from 0 on, module -> std as a multiple of init_std, written as in the papers' code.
EXPECTED = {
    "constant": lambda layers, layer, part: 1.0,
    "gpt2": lambda layers, layer, part: 1 / (2 * layers) ** 0.5 if part in ("o_proj", "down_proj") else 1.0,
    "internlm": lambda layers, layer, part: (
        1 / (2 * (layer + 1)) ** 0.5 if part in ("o_proj", "up_proj", "gate_proj", "down_proj") else 1.0
    ),
    "depth": lambda layers, layer, part: 1 / (2 * (layer + 1)) ** 0.5 if part in ("o_proj", "down_proj") else 1.0,
}


def drawn(kind: str, init: str | None) -> Decoder:
    make, attention, ffn = MODELS[kind]
    sizes: dict[str, Any] = {"embed_dim": 96, "num_layers": 3, "num_heads": 4, "max_seq_len": 16, "init_std": 0.05}
    model: Decoder = make(200, attention=attention, ffn=ffn, tie_embeddings=False, **sizes)
    model.init_weights(torch.Generator().manual_seed(3), None if init is None else load("init", init)())
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("init", EXPECTED)
def test_each_matrix_has_the_standard_deviation_of_the_formula(kind: str, init: str) -> None:
    matrices = {name: p for name, p in drawn(kind, init).named_parameters() if p.ndim == 2}
    assert {"tok_embeddings.weight", "output.weight", "layers.2.ffn.down_proj.weight"} < matrices.keys()
    for name, matrix in matrices.items():
        parts = name.split(".")
        factor = EXPECTED[init](3, int(parts[1]), parts[3]) if parts[0] == "layers" else 1.0
        assert float(matrix.detach().std()) == pytest.approx(0.05 * factor, rel=0.06), name


def test_constant_is_what_a_model_has_without_an_init() -> None:
    for plain, constant in zip(drawn("plm", None).parameters(), drawn("plm", "constant").parameters(), strict=True):
        assert torch.equal(plain, constant)
