"""PanGu-alpha: the query layer, against its formula written naively, and the presets; see test_own_parts, too."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plmtune.config.compose import compose
from plmtune.models.pangu_alpha import pangu_alpha
from plmtune.modules.segments import Segments
from plmtune.registry import Component


def small(**settings):
    torch.manual_seed(0)
    parts = {
        "attention": Component("attention", "gqa", {"num_kv_heads": 4, "rope": False, "bias": True}),
        "ffn": Component("ffn", "gelu", {"hidden_dim": 24}),
    }
    model = pangu_alpha(31, **parts | {"embed_dim": 16, "num_layers": 3, "num_heads": 4, "max_seq_len": 12} | settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def naively(model, tokens: Tensor) -> Tensor:
    """Logits, [s, v], of one text, [s], by the released code's form: no caches, no masks of other texts."""
    state = model.state_dict()
    s, heads, width = len(tokens), 4, 4

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (16,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = state["tok_embeddings.weight"][tokens] + state["pos_embeddings.weight"][:s]
    for index in range(3):
        layer = f"layers.{index}."
        normed = norm(x, f"{layer}attention_norm")
        asks = state["query_embeddings.weight"][:s] if index == 2 else normed
        q = linear(asks, f"{layer}attention.q_proj").view(s, heads, width)
        k = linear(normed, f"{layer}attention.k_proj").view(s, heads, width)
        v = linear(normed, f"{layer}attention.v_proj").view(s, heads, width)
        out = torch.zeros(s, heads, width)
        for at in range(s):
            for head in range(heads):
                scores = torch.softmax(k[: at + 1, head] @ q[at, head] / math.sqrt(width), 0)
                out[at, head] = scores @ v[: at + 1, head]
        x = x + linear(out.reshape(s, 16), f"{layer}attention.o_proj")
        inner = F.gelu(linear(norm(x, f"{layer}ffn_norm"), f"{layer}ffn.up_proj"), approximate="tanh")
        x = x + linear(inner, f"{layer}ffn.down_proj")
    return norm(x, "norm") @ state["tok_embeddings.weight"].T


TEXT = torch.tensor([3, 7, 1, 30, 12, 5, 9, 2])


@torch.no_grad()
def test_logits_are_those_of_the_formula_at_once_and_from_the_cache():
    model = small()
    expected = naively(model, TEXT)
    torch.testing.assert_close(model(TEXT[None])[0], expected, rtol=0, atol=2e-5)
    cache = model.new_cache(1, 8)
    pieces = [model(piece[None], cache=cache)[0] for piece in TEXT.split([3, 1, 1, 3])]
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_document_of_a_row_is_as_the_document_alone():
    model = small()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    found = model(TEXT[None], mask=Segments.of([[3, 5]]), input_pos=positions)[0]
    expected = torch.cat([naively(model, TEXT[:3]), naively(model, TEXT[3:])])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_an_attention_without_queries_of_their_own_is_refused():
    with pytest.raises(ValueError, match="query layer's attention must take queries of their own: use gqa or mha"):
        small(attention=Component("attention", "mla", {}))


@pytest.mark.parametrize(("preset", "count"), [("350m", 345_368_576), ("2.6b", 2_625_295_360), ("13b", 12_800_870_400),
                                               ("200b", 206_861_008_896)])  # fmt: skip
def test_presets_have_the_papers_sizes(preset, count):
    model = compose("pretrain", (), [f"model=pangu_alpha_{preset}"]).model
    with torch.device("meta"):
        assert model(vocab_size=40_000).num_parameters == count
