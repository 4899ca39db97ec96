"""The series activation: its formula and its start; test_own_parts has all that a model with it can do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.optim.optimizers import adamw, muon
from plmtune.registry import component, load

BASES = ("swiglu", "geglu", "gelu", "squared_relu")


def small(ffn: str = "siaf", **settings: Any) -> Decoder:
    sizes: dict[str, Any] = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 32, "init_std": 0.2}
    attention = component("attention", "gqa", num_kv_heads=2)
    model = llama(61, attention=attention, ffn=component("ffn", ffn, hidden_dim=40, **settings), **sizes)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))


def sigma(name: str, x: float) -> float:
    if name == "squared_relu":
        return max(x, 0.0) ** 2
    if name == "silu":
        return x / (1 + math.exp(-x))
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class TestFormula:
    @pytest.mark.parametrize(
        ("base", "kinds"),
        [
            ("swiglu", ("silu", "silu", "silu")),
            ("geglu", ("gelu", "gelu", "gelu")),
            ("gelu", ("gelu", "gelu", "gelu")),
            ("squared_relu", ("squared_relu", "silu", "silu")),
        ],
    )
    @torch.no_grad()
    def test_equals_the_formula_written_naively(self, base: str, kinds: tuple[str, ...]) -> None:
        torch.manual_seed(0)
        ffn = load("ffn", "siaf")(5, hidden_dim=7, num_terms=3, base=base).double()
        for parameter in ffn.parameters():
            parameter.normal_()
        x = torch.randn(5, dtype=torch.float64)
        a, b = ffn.series_scale.tolist(), ffn.series_bias.tolist()
        up = ffn.up_proj(x)
        gated = base in ("swiglu", "geglu")
        inputs = ffn.gate_proj(x) if gated else up
        hidden = [
            sum(sigma(kinds[i], a[i] * float(inputs[j]) + b[i]) for i in range(3)) * (float(up[j]) if gated else 1)
            for j in range(7)
        ]
        torch.testing.assert_close(ffn(x[None])[0], ffn.down_proj(torch.tensor(hidden, dtype=torch.float64)))

    def test_impossible_numbers_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"num_terms \(0\) must be at least 1"):
            small(num_terms=0)


class TestStart:
    @pytest.mark.parametrize("base", BASES)
    @torch.no_grad()
    def test_gives_the_logits_of_the_base_bit_for_bit(self, base: str) -> None:
        model, plain = small(base=base), small(base)
        assert torch.equal(model(tokens()), plain(tokens()))
        assert [p.tolist() for p in (model.layers[1].ffn.series_scale, model.layers[1].ffn.series_bias)] == [
            [1, 0],
            [0, 0],
        ]
        model, plain = model.bfloat16(), plain.bfloat16()
        assert torch.equal(model(tokens()), plain(tokens()))

    @pytest.mark.parametrize("base", BASES)
    def test_every_number_has_a_gradient(self, base: str) -> None:
        model = small(base=base, num_terms=3)
        model(tokens()).square().mean().backward()
        assert all(p.grad is not None and p.grad.all() for n, p in model.named_parameters() if ".series_" in n)

    def test_the_series_neither_decays_nor_is_orthogonalised(self) -> None:
        model = small()
        series = {id(p) for name, p in model.named_parameters() if ".series_" in name}
        assert len(series) == 4
        for optimizer in (adamw(model), muon(model)):
            groups = [g for g in optimizer.param_groups if series & {id(p) for p in g["params"]}]
            assert [group["weight_decay"] for group in groups] == [0.0]
        hidden = muon(model).param_groups[0]["params"]
        assert not series & {id(p) for p in hidden}

    def test_autocast_keeps_its_dtype(self) -> None:
        ffn = small().layers[0].ffn
        with torch.autocast("cpu", torch.bfloat16):
            assert ffn._series(torch.ones(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
