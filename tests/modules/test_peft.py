"""Adapters: what they compute, what they train, and that generation with them is generation with them merged."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import (
    adapted,
    adapter_parameters,
    disabled,
    effective_weight,
    init_adapters,
    merge,
)
from plmtune.registry import component, load

KINDS = ("lora", "qlora", "dora")
TOKENS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))


def base(architecture: str = "plm", **settings: Any) -> Decoder:
    torch.manual_seed(0)
    rest: dict[str, Any] = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 32, "init_std": 0.15}
    if architecture == "llama":
        attention = component("attention", "gqa", num_kv_heads=2, **settings)
        return llama(101, attention=attention, ffn=component("ffn", "swiglu", hidden_dim=128), **rest)
    attention = component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    return plm(101, attention=attention, ffn=component("ffn", "squared_relu", hidden_dim=128), **rest)


def adapt(model: Decoder, kind: str, **settings: Any) -> Decoder:
    load("peft", kind)(model=model, **{"rank": 4, "alpha": 6.0, **settings})
    return model


def taught(kind: str, architecture: str = "plm", **settings: Any) -> Decoder:
    """A model whose adapters say something."""
    model = adapt(base(architecture), kind, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


class TestAtTheStart:
    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_the_model_says_what_its_base_says(self, kind: str) -> None:
        torch.testing.assert_close(adapt(base(), kind)(TOKENS), base()(TOKENS), rtol=0, atol=1e-5)

    def test_qlora_says_what_its_4_bits_say(self) -> None:
        model = adapt(base(), "qlora")
        layer = model.layers[0].ffn.up_proj
        assert type(layer.weight.data).__name__ == "NF4Tensor"
        error = (layer.weight.to(torch.float32) - base().layers[0].ffn.up_proj.weight).norm()
        # NF4's mean error on normal numbers is about 0.09 of their spread (QLoRA, figure 3).
        assert 0.05 < error / base().layers[0].ffn.up_proj.weight.norm() < 0.12
        assert model.layers[0].attention_norm.weight.dtype == torch.float32

    def test_a_copy_of_4_bits_has_the_same_bits(self) -> None:
        # 96 blocks: the libraries' own copy wants multiples of 256.
        layer = taught("qlora").layers[0].attention.q_proj
        copied = copy.deepcopy(layer)
        assert layer.weight.numel() // 64 == 96
        assert torch.equal(copied.weight.to(torch.float32), layer.weight.to(torch.float32))

    def test_a_generator_decides_the_numbers(self) -> None:
        states = []
        for seed in (3, 3, 4):
            model = adapt(base(), "lora")
            init_adapters(model, torch.Generator().manual_seed(seed))
            states.append(model.layers[1].attention.q_proj.lora_a.weight)
        assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
        assert states[0].abs().max() <= 1 / 64**0.5

    @pytest.mark.parametrize("kind", KINDS)
    def test_on_meta_they_are_counted_and_nothing_is_drawn(self, kind: str) -> None:
        with torch.device("meta"):
            model = base()
        adapt(model, kind)
        assert all(parameter.is_meta for parameter in model.parameters())
        count = sum(p.numel() for p in adapt(base(), kind).parameters() if p.requires_grad)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count > 0


class TestFormulas:
    def outputs(self, kind: str) -> tuple[Any, Tensor, Tensor]:
        layer = taught(kind).layers[0].ffn.up_proj
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
        return layer, x, layer(x)

    def test_lora_is_w_plus_alpha_over_rank_b_a(self) -> None:
        layer, x, y = self.outputs("lora")
        a, b = layer.lora_a.weight, layer.lora_b.weight
        torch.testing.assert_close(y, x @ layer.weight.T + 6 / 4 * (x @ a.T) @ b.T)

    def test_dora_gives_each_row_its_length(self) -> None:
        layer, x, y = self.outputs("dora")
        v = layer.weight + 6 / 4 * layer.lora_b.weight @ layer.lora_a.weight
        torch.testing.assert_close(y, x @ (layer.magnitude[:, None] * F.normalize(v, dim=1)).T)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_effective_weight_is_the_one_that_acts(self, kind: str) -> None:
        layer, x, y = self.outputs(kind)
        torch.testing.assert_close(F.linear(x, effective_weight(layer)), y)


class TestTraining:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("autocast", [False, True])
    def test_reaches_the_adapters_and_nothing_else(self, kind: str, autocast: bool) -> None:
        model = taught(kind).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(TOKENS).square().mean().backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == set(adapter_parameters(model))
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(model).values())

    def test_a_score_head_is_still_trained(self) -> None:
        model = base()
        model.add_score_head()
        adapt(model, "lora")
        assert model.score.weight.requires_grad and "score.weight" in adapter_parameters(model)
        assert not model.tok_embeddings.weight.requires_grad

    @pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
    def test_optimizers_leave_out_what_is_frozen(self, name: str) -> None:
        model = taught("qlora")
        optimizer = load("optimizer", name)(model=model)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in adapter_parameters(model).values()}

    def test_dropout_acts_in_training_only(self) -> None:
        model = taught("lora", dropout=0.5)
        assert torch.equal(model(TOKENS), model(TOKENS))
        model.train()
        assert not torch.equal(model(TOKENS), model(TOKENS))

    def test_activation_checkpointing_gives_the_same_gradients(self) -> None:
        gradients = []
        for checkpointing in ("none", "full", "selective"):
            model = taught("lora").train()
            model.activation_checkpointing = checkpointing
            model(TOKENS).square().mean().backward()
            gradients.append(model.layers[0].attention.q_proj.lora_a.weight.grad)
        for other in gradients[1:]:
            torch.testing.assert_close(gradients[0], other)


class TestDisabled:
    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_the_model_is_its_base_and_then_itself_again(self, kind: str) -> None:
        model = taught(kind)
        before = model(TOKENS)
        with disabled(model):
            assert torch.equal(model(TOKENS), base()(TOKENS))
            assert torch.equal(effective_weight(model.layers[0].ffn.up_proj), base().layers[0].ffn.up_proj.weight)
        assert torch.equal(model(TOKENS), before)
        assert not torch.equal(before, base()(TOKENS))

    def test_an_error_inside_does_not_leave_them_off(self) -> None:
        model = taught("lora")
        before = model(TOKENS)
        with pytest.raises(KeyError), disabled(model):
            raise KeyError
        assert torch.equal(model(TOKENS), before)


class TestMerged:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("architecture", ["plm", "llama"])
    def test_the_model_is_plain_and_says_the_same(self, kind: str, architecture: str) -> None:
        model = taught(kind, architecture)
        before = model(TOKENS)
        merge(model)
        assert not adapted(model)
        assert {name: type(m) for name, m in model.named_modules()} == {
            name: type(m) for name, m in base(architecture).named_modules()
        }
        assert all(parameter.requires_grad for parameter in model.parameters())
        torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_decoding_over_a_cache_with_adapters_is_decoding_merged(self, kind: str) -> None:
        # One token at a time MLA reads kv_b_proj's weight itself, with an adapter beside it.
        model = taught(kind, targets=("attention",))
        plain = copy.deepcopy(model)
        merge(plain)
        decoded = []
        for one in (model, plain):
            cache = one.new_cache(2, 16)
            with torch.no_grad():
                steps = [one(TOKENS[:, :3], cache=cache)[:, -1]]
                steps += [one(TOKENS[:, i : i + 1], cache=cache)[:, 0] for i in range(3, 9)]
            decoded.append(torch.stack(steps, 1))
        torch.testing.assert_close(decoded[0], decoded[1], rtol=0, atol=1e-4)
        torch.testing.assert_close(decoded[0], model(TOKENS)[:, 2:], rtol=0, atol=1e-4)


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "names"),
        [
            (("ffn",), {"ffn.up_proj", "ffn.down_proj"}),
            (("q_proj", "down_proj"), {"attention.q_proj", "ffn.down_proj"}),
            (("kv_b_proj",), {"attention.kv_b_proj"}),
        ],
    )
    def test_are_groups_or_layers_by_name(self, targets: tuple[str, ...], names: set[str]) -> None:
        model = adapt(base(), "lora", targets=targets)
        assert set(adapted(model)) == {f"layers.{i}.{name}" for i in range(2) for name in names}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"targets": ("k_proj",)}, r"has no 'k_proj'; it has attention, q_proj, kv_a_proj, kv_b_proj, o_proj"),
            ({"targets": ()}, r"at least one"),
            ({"rank": 0}, r"rank \(0\) must be at least 1"),
            ({"alpha": 0.0}, r"alpha \(0.0\) must be above 0"),
            ({"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ],
    )
    def test_what_is_impossible_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            adapt(base(), "lora", **settings)

    def test_adapters_upon_adapters_are_refused(self) -> None:
        with pytest.raises(ValueError, match="has adapters already"):
            adapt(adapt(base(), "lora"), "dora")

    def test_a_bias_stays_with_lora_and_is_refused_by_dora(self) -> None:
        model = base("llama", bias=True)
        torch.nn.init.normal_(model.layers[0].attention.q_proj.bias)
        before = model(TOKENS)
        for kind in ("lora", "qlora"):
            other = adapt(copy.deepcopy(model), kind, targets=("attention",))
            assert torch.equal(other.layers[0].attention.q_proj.bias, model.layers[0].attention.q_proj.bias)
            if kind == "lora":
                torch.testing.assert_close(other(TOKENS), before)
        with pytest.raises(ValueError, match=r"attention.q_proj has a bias, which dora does not take"):
            adapt(model, "dora")
