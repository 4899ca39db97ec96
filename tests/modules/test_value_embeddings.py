"""Value embeddings: their formula, the layers that have them, and what counts them; see test_own_parts, too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from plmtune.config.compose import compose
from plmtune.devices.costs import ModelShape, weights
from plmtune.devices.device import load_device
from plmtune.devices.sweep import sweep
from plmtune.errors import UserError
from plmtune.models.gemma import gemma3
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.optim.optimizers import adamw, muon
from plmtune.registry import component
from plmtune.training.activations import activation_bytes
from plmtune.training.estimate import estimate
from plmtune.training.runtime import Runtime


def small(value_embed: int | None = 2, **settings: Any) -> Decoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 48, "num_layers": 3, "num_heads": 6, "max_seq_len": 64, "init_std": 0.2}
    attention = component("attention", "gqa", num_kv_heads=2, head_dim=10, value_embed=value_embed)
    parts = {"attention": attention, "ffn": component("ffn", "swiglu", hidden_dim=64)}
    return llama(101, **(parts | sizes | settings))


def tokens(b: int, s: int, seed: int = 1) -> Tensor:
    return torch.randint(101, (b, s), generator=torch.Generator().manual_seed(seed))


class TestFormula:
    @torch.no_grad()
    def test_equals_the_formula_written_naively(self) -> None:
        model, ids = small(1, num_layers=1), tokens(1, 5)
        attention: Any = model.layers[0].attention
        x = torch.randn(1, 5, 48)
        table = model.value_embeddings["0"].weight  # type: ignore[index]
        found = attention(x, **model.of_tokens(0, ids))
        values = attention.v_proj(x[0]).view(5, 2, 10).clone()
        for t in range(5):
            for head in range(2):
                gate = 2 / (1 + math.exp(-float(attention.value_gate[head] @ x[0, t, :32])))
                values[t, head] += gate * table[ids[0, t]][10 * head : 10 * head + 10]
        q, k = (attention.rope(part.view(1, 5, -1, 10))[0] for part in (attention.q_proj(x), attention.k_proj(x)))
        heads = torch.zeros(5, 6, 10)
        for t in range(5):
            for head in range(6):
                scores = torch.stack([q[t, head] @ k[i, head // 3] / 10**0.5 for i in range(t + 1)]).softmax(0)
                heads[t, head] = sum(scores[i] * values[i, head // 3] for i in range(t + 1))
        torch.testing.assert_close(found[0], attention.o_proj(heads.flatten(1)), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(("every", "having"), [(1, "012345"), (2, "135"), (3, "25"), (9, "5"), (None, "")])
    def test_the_last_layer_has_them_and_each_nth_before_it(self, every: int | None, having: str) -> None:
        model = small(every, num_layers=6)
        assert "".join(model.value_embeddings or "") == having
        gates = {name.split(".")[1] for name, _ in model.named_parameters() if name.endswith("value_gate")}
        assert gates == set(having)

    def test_layers_of_a_pattern_keep_their_types(self) -> None:
        attention = component("attention", "gqa", num_kv_heads=1, head_dim=8, window=4, value_embed=2)
        sizes: dict[str, Any] = {"embed_dim": 32, "num_layers": 4, "num_heads": 2, "max_seq_len": 16}
        with torch.device("meta"):
            model = gemma3(50, attention=attention, layers=("local", "local", "global"), **sizes)
        found = [(layer.attention.window, layer.attention.value_embed_width) for layer in model.layers]
        assert found == [(4, 0), (4, 8), (None, 0), (4, 8)]

    def test_an_impossible_number_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"value_embed \(0\) must be at least 1"):
            small(0)

    def test_latent_attention_has_none_and_says_who_has(self) -> None:
        with pytest.raises(UserError, match=r"model.attention is mla, which has no key value_embed; .* it: gqa"):
            compose("demo", (), ["model.attention.value_embed=2"])


class TestForward:
    def test_compiled_layers_have_the_same_gradients(self) -> None:
        gradients = []
        for compiled in (False, True):
            model = small(num_layers=1)
            for layer in model.layers if compiled else ():
                layer.compile(backend="aot_eager", fullgraph=True)  # type: ignore[operator]
            model(tokens(2, 12)).square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)

    def test_autocast_keeps_them_in_bf16(self) -> None:
        model = small()
        with torch.autocast("cpu", torch.bfloat16):
            assert model.of_tokens(2, tokens(1, 8))["value"].dtype == torch.bfloat16
            assert model(tokens(1, 8), hidden=True).dtype == torch.bfloat16


class TestElsewhere:
    def test_tables_are_adamws_and_no_decay_names_them(self) -> None:
        model = small(2)
        tables = {id(p) for p in model.value_embeddings.parameters()}  # type: ignore[union-attr]
        hidden, *others = muon(model).param_groups
        assert not tables & {id(p) for p in hidden["params"]} and len(tables) == 2
        assert tables < {id(p) for group in others for p in group["params"]}
        decayed, still = (
            {id(p) for p in g["params"]} for g in adamw(model, no_decay=("value_embeddings",)).param_groups
        )
        assert tables < still and not tables & decayed

    def test_estimates_count_tables_that_are_only_read(self) -> None:
        plain, model = small(None), small(2)
        tables, gates = 2 * 101 * 20, 2 * 2 * 32
        run: dict[str, Any] = {"optimizer": "muon", "seq_len": 32, "micro_batch_size": 2}
        runtime = Runtime(torch.device("cpu"), torch.float32)
        before, after = (estimate(each, runtime, **run) for each in (plain, model))
        assert after.parameters - before.parameters == tables + gates
        assert after.non_embedding_parameters - before.non_embedding_parameters == gates
        assert after.flops_6n - before.flops_6n == 6 * gates
        assert after.optimizer - before.optimizer == 8 * tables + 4 * gates
        # Each layer keeps e, the gate and its sigmoid; checkpointed, e alone, and one layer at a time the rest.
        kept = activation_bytes(model, 2, 32) - activation_bytes(plain, 2, 32)
        assert kept == 4 * 64 * 2 * (20 + 2 * 2)
        kept = activation_bytes(model, 2, 32, activation_checkpointing="full")
        kept -= activation_bytes(plain, 2, 32, activation_checkpointing="full")
        assert kept == 4 * 64 * (2 * 20 + 2 * 2)

    def test_costs_of_a_token_leave_them_out_and_a_sweep_counts_its_layers(self) -> None:
        plain, model = (weights(ModelShape.of(small(every)), "plmtune", "int8") for every in (None, 2))
        assert model.read == plain.read and model.products == plain.products
        assert model.file - plain.file == 2 * (101 * 20 + 2 * 101) + 2 * 2 * 2 * 32
        settings = ["model=smollm2_135m", "model.attention.value_embed=2", "model.num_layers=2,5"]
        two, five = sweep("pretrain", (), settings, load_device("pi5"), scheme="bf16").points
        layers = five.non_embedding - two.non_embedding
        assert five.parameters - two.parameters - layers == 2 * 4096 * 192
