"""The effective dimension of hidden states: the formula, and what is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.training.effective_dimension import EffectiveDimension


def small() -> Decoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 24, "num_layers": 3, "num_heads": 4, "max_seq_len": 32, "init_std": 0.3}
    attention = component("attention", "gqa", num_kv_heads=2)
    return llama(61, attention=attention, ffn=component("ffn", "swiglu", hidden_dim=32), **sizes).eval()


def batches() -> list[Tensor]:
    return [torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def naive(hidden: np.ndarray[Any, Any]) -> int:
    """Of hidden states, [n, d]: components by their singular values, until they hold 80% of the variance."""
    singular = np.linalg.svd(hidden - hidden.mean(0), compute_uv=False)
    total, held, number = float((singular**2).sum()), 0.0, 0
    while held < 0.8 * total:
        held += float(singular[number] ** 2)
        number += 1
    return number


@torch.no_grad()
def test_equals_the_formula_written_naively() -> None:
    model = small()
    measured = EffectiveDimension(model)
    seen: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for layer, module in enumerate(model.layers):
        module.register_forward_hook(lambda module, args, out, layer=layer: seen[layer].append(out[:, 1:10]))
    for ids in batches():
        counted = torch.ones_like(ids, dtype=torch.bool)
        counted[:, 10:] = False  # padding
        with measured.of(counted):
            model(ids)
    model(batches()[0])  # not measured
    states = {layer: torch.cat(outputs[:3]).flatten(0, 1).double().numpy() for layer, outputs in seen.items()}
    expected = {f"effective_dimension/{layer}": naive(held) for layer, held in states.items()}
    assert measured.metrics() == expected
    assert min(expected.values()) > 1 and max(expected.values()) < 24
    assert model.observe is None


@torch.no_grad()
def test_states_along_one_direction_have_one_dimension() -> None:
    model = small()
    for layer in model.layers:
        for name in ("attention.o_proj", "ffn.down_proj"):
            layer.get_submodule(name).weight.zero_()
    model.tok_embeddings.weight.copy_(torch.arange(61.0)[:, None] * torch.randn(24) + 5)
    measured = EffectiveDimension(model)
    with measured.of(torch.ones(4, 12, dtype=torch.bool)):
        model(batches()[0])
    assert set(measured.metrics().values()) == {1.0}


@torch.no_grad()
def test_nothing_is_measured_where_it_is_not_wanted() -> None:
    model = small()
    measured = EffectiveDimension(model, wanted=False)
    with measured.of(torch.ones(4, 12, dtype=torch.bool)):
        model(batches()[0])
    assert measured.metrics() == {}
