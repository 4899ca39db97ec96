"""Augmented shortcuts: their formula, their start, and all that a model with them can do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plmtune.config.compose import compose
from plmtune.export.lint import lint
from plmtune.models.gemma import gemma2
from plmtune.models.hf import load_model, save_model
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.modules.segments import Segments
from plmtune.native.decoder import NativeDecoder
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


@pytest.mark.parametrize("attention", SETTINGS)
class TestForward:
    @torch.no_grad()
    def test_decoding_with_a_cache_equals_one_forward(self, attention: str) -> None:
        model, ids = small(attention), tokens(2, 9)
        cache = model.new_cache(2, 16)
        parts = [model(part, cache=cache) for part in ids.split((4, 3, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_packed_and_padded_rows_are_those_of_each_text_alone(self, attention: str) -> None:
        model, ids = small(attention), tokens(2, 16)
        alone = torch.cat([model(part) for part in ids[:1].split((5, 1, 10), dim=1)], 1)
        positions = torch.tensor([[*range(5), 0, *range(10)], [*range(16)]])
        packed = model(ids, mask=Segments.of([(5, 1, 10), (16,)]), input_pos=positions)
        torch.testing.assert_close(packed[:1], alone, atol=1e-5, rtol=1e-5)
        padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids[1:]), 1)
        mask = torch.ones(20, 20, dtype=torch.bool).tril()[None] & (torch.arange(20) >= 4)
        mask[:, :4, 0] = True  # a query sees something
        found = model(padded, mask=mask, input_pos=(torch.arange(20) - 4).clamp(min=0)[None])
        torch.testing.assert_close(found[:, 4:], model(ids[1:]), atol=1e-5, rtol=1e-5)

    def test_every_matrix_has_a_gradient_with_checkpointing_or_without(self, attention: str) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = small(attention).train()
            model.activation_checkpointing = checkpointing
            model(tokens(2, 9)).square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)

    def test_a_saved_model_is_the_same(self, attention: str, tmp_path: Path) -> None:
        model = small(attention)
        save_model(model, None, tmp_path)
        again = load_model(tmp_path).eval()
        assert again.config == model.config
        with torch.no_grad():
            assert torch.equal(again(tokens(2, 9)), model(tokens(2, 9)))

    def test_other_formats_refuse_it_by_name(self, attention: str) -> None:
        model = small(attention)
        for target in ("gguf", "hf", "executorch"):
            refused = [found.text for found in lint(model.config, target) if found.level == "refused"]
            assert len(refused) == 1 and "shortcut" in refused[0], refused
        assert NativeDecoder().bind(model) is None
