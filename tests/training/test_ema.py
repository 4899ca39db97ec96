"""The average of the weights: its formula, what a run keeps of it, and that it resumes."""

import pytest
import torch

from plmtune.config import compose
from plmtune.training.ema import Ema


def tiny() -> torch.nn.Module:
    model = compose.compose("pretrain", (), ["model=plm_tiny"]).model(vocab_size=257)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


class TestEma:
    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
    def test_equals_the_formula_written_naively(self, decay: float) -> None:
        model = tiny()
        weight = model.layers[0].ffn.up_proj.weight
        expected = weight.detach().double().clone()
        ema = Ema.of(model, decay)
        for step in range(30):
            with torch.no_grad():
                weight.add_(0.1 * (step + 1))
            ema.update(model)
            d = min(decay, (1 + step) / (10 + step))
            expected = d * expected + (1 - d) * weight.detach().double()
        (name,) = (name for name in ema.tensors if name.endswith("layers.0.mlp.up_proj.weight"))
        assert torch.allclose(ema.tensors[name].double(), expected, rtol=1e-5)

    def test_the_model_has_the_averages_inside_the_block_alone(self) -> None:
        model = tiny()
        ema = Ema.of(model, 0.9)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        with ema.applied(model):
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(torch.equal(p, 2 * before[name]) for name, p in model.named_parameters())
