"""A stem: what many rows begin with, computed once and never written to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plmtune.models.plm import plm
from plmtune.modules.cache import SharedPrefix
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component

ATTENTIONS = {
    "mla": component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12),
    "gqa": component("attention", "gqa", num_kv_heads=2),
    "mha": component("attention", "mha", rope_interleaved=True),
    "value_embed": component("attention", "gqa", num_kv_heads=2, value_embed=1),
}


def small(attention: Component) -> Decoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
    return plm(101, attention=attention, ffn=component("ffn", "squared_relu", hidden_dim=96), init_std=0.15, **sizes)


def tokens(b: int, s: int, seed: int = 1) -> Tensor:
    return torch.randint(101, (b, s), generator=torch.Generator().manual_seed(seed))


def shared_prefix_of(model: Decoder, ids: Tensor) -> SharedPrefix:
    cache = model.new_cache(1, 32)
    model(ids, cache=cache)
    return SharedPrefix(cache)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
class TestStem:
    @pytest.mark.parametrize("new", [1, 7])
    @torch.no_grad()
    def test_rows_after_a_stem_are_those_of_whole_texts(self, attention: Component, new: int) -> None:
        model, begin, rows = small(attention), tokens(1, 20), tokens(3, new, seed=2)
        whole = model(torch.cat((begin.expand(3, -1), rows), dim=1))
        close(model(rows, cache=shared_prefix_of(model, begin)), whole[:, 20:])

    @torch.no_grad()
    def test_a_forward_leaves_it_as_it_was(self, attention: Component) -> None:
        model = small(attention)
        stem = shared_prefix_of(model, tokens(1, 20))
        before = stem.clone()
        first = model(tokens(3, 5, seed=2), cache=stem)
        assert stem.length == 20
        assert all(
            torch.equal(now, then)
            for layer, old in zip(stem.layers, before.layers, strict=True)
            for now, then in zip(layer, old, strict=True)
        )
        assert torch.equal(model(tokens(3, 5, seed=2), cache=stem), first)

    @torch.no_grad()
    def test_rows_of_several_texts_may_be_longer_than_the_model_where_no_position_is(
        self, attention: Component
    ) -> None:
        model, begin, texts = small(attention), tokens(1, 20), tokens(3, 10, seed=2)
        whole = model(torch.cat((begin.expand(3, -1), texts), dim=1))
        mask = torch.zeros(1, 30, 50, dtype=torch.bool)
        mask[:, :, :20] = True
        mask[0, :, 20:] = torch.block_diag(*[torch.ones(10, 10).tril()] * 3).bool()
        input_pos = torch.arange(20, 30).repeat(3)[None]
        packed = model(texts.view(1, -1), mask=mask, input_pos=input_pos, cache=shared_prefix_of(model, begin))
        close(packed.view(3, 10, -1), whole[:, 20:])

    def test_a_position_behind_the_models_last_is_refused(self, attention: Component) -> None:
        model = small(attention)
        with pytest.raises(ValueError, match=r"a sequence of 33 tokens exceeds the model's max_seq_len \(32\)"):
            model(tokens(2, 13), cache=shared_prefix_of(model, tokens(1, 20)))


class TestLatents:
    @torch.no_grad()
    def test_keys_and_values_of_a_stem_are_expanded_for_one_row_alone(self) -> None:
        model = small(ATTENTIONS["mla"])
        stem = shared_prefix_of(model, tokens(1, 20))
        layer: Any = model.layers[0]
        seen: list[int] = []
        layer.attention.kv_b_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2].numel()))
        model(tokens(3, 5), cache=stem)
        assert seen == [20, 3 * 5]
