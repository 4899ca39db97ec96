"""Augmented shortcuts: their formula and their start; test_own_parts has all that a model with them can do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from plmtune.config.compose import compose
from plmtune.models.gemma import gemma2
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, load

AUGMENTED = component("shortcut", "augmented", reduction=8)
NONE = component("shortcut", "none")
SETTINGS: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2},
    "mla": {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
}


def small(attention: str, shortcut: Component = AUGMENTED, *, trained: bool = True, make: Any = llama) -> Decoder:
    """A model; trained: all numbers of its shortcuts are drawn, so that they matter."""
    sizes: dict[str, Any] = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 64, "init_std": 0.2}
    part = component("attention", attention, **SETTINGS[attention], shortcut=shortcut)
    ffn = component("ffn", "squared_relu" if attention == "mla" else "swiglu", hidden_dim=40)  # PLM's, Llama's
    model: Decoder = make(61, attention=part, ffn=ffn, **sizes)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    if trained:
        for name, parameter in model.named_parameters():
            if ".shortcut." in name:
                parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def tokens(b: int, s: int, seed: int = 1) -> Tensor:
    return torch.randint(61, (b, s), generator=torch.Generator().manual_seed(seed))


class TestFormula:
    @torch.no_grad()
    def test_equals_the_formula_written_naively(self) -> None:
        torch.manual_seed(0)
        shortcut = load("shortcut", "augmented")(16, num_shortcuts=3, reduction=4)
        for parameter in shortcut.parameters():
            parameter.normal_()
        z, expected = torch.randn(16), torch.zeros(16)
        for i in range(3):
            down, up = shortcut.down[4 * i : 4 * i + 4], shortcut.up[:, 4 * i : 4 * i + 4]
            inner = [float(row @ z) for row in down]
            expected += up @ torch.tensor([x * (1 + math.erf(x / 2**0.5)) / 2 for x in inner])
        torch.testing.assert_close(shortcut(z[None])[0], expected)

    @pytest.mark.parametrize("attention", SETTINGS)
    @torch.no_grad()
    def test_is_added_to_what_attention_gives(self, attention: str) -> None:
        layer: Any = small(attention).layers[0].attention
        x = torch.randn(1, 5, 32)
        found, added = layer(x), layer.shortcut(x)
        layer.shortcut = None
        torch.testing.assert_close(found, layer(x) + added)

    def test_impossible_numbers_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"reduction \(64\) is more than embed_dim \(32\)"):
            small("gqa", component("shortcut", "augmented", reduction=64))
        with pytest.raises(ValueError, match=r"num_shortcuts \(0\) must be at least 1"):
            small("gqa", component("shortcut", "augmented", num_shortcuts=0))

    def test_a_config_names_it(self) -> None:
        overrides = ["model.attention.shortcut=augmented", "model.attention.shortcut.reduction=16"]
        shortcut = compose("demo", (), overrides).model.settings["attention"].settings["shortcut"]
        assert (shortcut.name, shortcut.settings) == ("augmented", {"num_shortcuts": 2, "reduction": 16})


class TestStart:
    @pytest.mark.parametrize("attention", SETTINGS)
    @torch.no_grad()
    def test_gives_the_logits_of_the_base_bit_for_bit(self, attention: str) -> None:
        model, plain = small(attention, trained=False), small(attention, NONE)
        assert torch.equal(model(tokens(2, 9)), plain(tokens(2, 9)))
        assert model.layers[0].attention.shortcut.down.any()

    @torch.no_grad()
    def test_norms_after_attention_take_it_too(self) -> None:
        model, plain = (small("gqa", part, trained=False, make=gemma2) for part in (AUGMENTED, NONE))
        assert torch.equal(model(tokens(2, 9)), plain(tokens(2, 9)))
