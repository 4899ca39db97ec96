"""Costs of parts that not every family has: windows and learned positions."""

import torch

from plmtune.devices.costs import Attention, ModelShape
from plmtune.modules.decoder import Decoder
from plmtune.quantization.schemes import candidates
from plmtune.registry import component


def test_pairs_of_a_window_are_those_of_its_mask() -> None:
    for window in (None, 3, 50):
        attention = Attention("heads", 1, 1, 1, 1, 1, window)
        mask = torch.ones(20, 20).tril().triu(-min(window or 20, 20) + 1)
        assert abs(attention.pairs(20) - int(mask.sum())) <= 20  # the diagonal counts half
        assert attention.seen(20) == int(mask[-1].sum())


def test_learned_positions_are_looked_up_and_never_quantized() -> None:
    with torch.device("meta"):
        model: Decoder = component("model", "gpt2", num_layers=1)(vocab_size=101)
    shape = ModelShape.of(model)
    assert shape.parameters == model.num_parameters
    assert "pos_embeddings" not in {matrix.name for matrix in shape.multiplied}
    assert "pos_embeddings" not in candidates(model)
