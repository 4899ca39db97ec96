"""Masks that are not of everything: of KV heads alone, between 0 and 1, and gone after the context."""

import torch
from small import IDS, small_llama

from plmtune.pruning.cut import Cut, apply_cut
from plmtune.pruning.masked import masked, masked_norm


@torch.no_grad()
def test_a_mask_of_kv_heads_masks_the_query_heads_that_they_serve() -> None:
    model = small_llama()  # 4 heads over 2 KV heads
    units = {f"layers.{i}.heads": (0, 1) for i in (0, 1)} | {f"layers.{i}.kv_heads": (0,) for i in (0, 1)}
    small = apply_cut(model, Cut((0, 1), units))
    whole = model(IDS)
    with masked(model, lambda: {f"layers.{i}.kv_heads": torch.tensor([1.0, 0]) for i in (0, 1)}):
        torch.testing.assert_close(model(IDS), small(IDS))
    torch.testing.assert_close(model(IDS), whole, rtol=0, atol=0)


@torch.no_grad()
def test_masks_of_1_change_nothing_and_a_layer_is_masked_in_proportion() -> None:
    model = small_llama(num_layers=1)
    whole = model(IDS)
    ones = {"channels": torch.ones(64), "layers.0.neurons": torch.ones(96), "layers": torch.ones(1)}
    with masked(model, lambda: ones):
        torch.testing.assert_close(model(IDS), whole)
    x = model.tok_embeddings(IDS)
    half = x + (model.layers[0](x) - x) / 2
    with masked(model, lambda: {"layers": torch.tensor([0.5])}):
        torch.testing.assert_close(model(IDS), model.logits(model.norm(half)))


def test_gradients_reach_every_mask() -> None:
    model = small_llama()
    masks = {name: torch.full((n,), 0.7, requires_grad=True) for name, n in (("channels", 64), ("layers", 2))}
    with masked(model, lambda: masks):
        model(IDS, hidden=True).square().mean().backward()
    assert all(mask.grad is not None and mask.grad.abs().min() > 0 for mask in masks.values())


def test_a_norm_counts_what_stays() -> None:
    model = small_llama()
    x, mask = torch.randn(3, 64), torch.ones(64)
    mask[10:] = 0
    norm = torch.nn.functional.rms_norm(x[:, :10], (10,), model.norm.weight[:10], model.norm.eps)
    torch.testing.assert_close(masked_norm(model.norm, x, mask)[:, :10], norm)
