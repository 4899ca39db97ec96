"""A prepared model computes what its quantized form will, learns through it, and is saved as a plain one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_plm
from torch import Tensor, nn

from plmtune.config.compose import build
from plmtune.errors import UserError
from plmtune.models.hf import load_model, save_model
from plmtune.modules.peft import effective_weight
from plmtune.modules.quantized import Format
from plmtune.quantization import qat
from plmtune.quantization.quantize import quantize, round_weight
from plmtune.registry import component

IDS = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(5))
FORMATS = ["int8", "int4_g16", "int4_g32", "int8_dynamic_int8", "int8_dynamic_int4_g16"]


def small_plm(**settings: Any) -> Any:
    sizes = {"embed_dim": 32, "num_heads": 2, "max_seq_len": 32}
    model = tiny_plm(80, mla={"v_head_dim": 16}, hidden_dim=64, **sizes, **settings)
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def small_llama() -> Any:
    sizes = {"embed_dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 32, "tie_embeddings": False}
    model = tiny_llama(80, gqa={"num_kv_heads": 1}, hidden_dim=64, **sizes)
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def scheme(name: str, **settings: Any) -> Any:
    return component("quantization", name, **settings)


def reloaded(model: Any, make: Callable[[], Any]) -> Any:
    """The same parameters in a model without fake quantization, as a checkpoint is loaded."""
    plain = make().train(model.training)
    plain.load_state_dict(model.state_dict())
    return plain


class TestPreparedModel:
    @pytest.mark.parametrize(
        "chosen",
        [
            scheme("int8"),
            scheme("int4", group_size=16),
            scheme("int4", embedding="int4_g32", rules={"*.down_proj": "keep"}),
            scheme("int8_dynamic", embedding="int8_dynamic_int8"),
            scheme("int8_dynamic_int4", group_size=16),
        ],
        ids=lambda chosen: chosen.name,
    )
    @pytest.mark.parametrize("make", [small_plm, small_llama])
    def test_computes_what_the_quantized_model_computes(self, make: Callable[[], Any], chosen: Any) -> None:
        model = make().eval()
        plain = model(IDS)
        plan = chosen(model=model)
        qat.insert_fake_quantize(model, plan)
        prepared = model(IDS)
        hidden = model(IDS, hidden=True)
        by_the_loss = hidden @ model.head_weight.T
        cache = model.new_cache(2, 16)
        decoded = [model(IDS[:, i : i + 1], cache=cache) for i in range(3)]  # absorbed, in MLA
        model = reloaded(model, make)
        quantize(model, plan)
        expected = model(IDS)
        cache = model.new_cache(2, 16)
        assert (expected - plain).abs().max() > 1e-2
        torch.testing.assert_close(prepared, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(by_the_loss, expected, atol=1e-4, rtol=0)
        for i in range(3):
            torch.testing.assert_close(decoded[i], model(IDS[:, i : i + 1], cache=cache), atol=1e-4, rtol=0)

    def test_keeps_the_names_and_the_memory_of_its_parameters(self) -> None:
        model = small_plm()
        before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        qat.insert_fake_quantize(model, scheme("int4", group_size=16)(model=model))
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before

    def test_preparing_draws_no_random_numbers(self) -> None:
        model = small_plm()
        before = torch.get_rng_state()
        qat.insert_fake_quantize(model, scheme("int8")(model=model))
        assert torch.equal(torch.get_rng_state(), before)

    def test_its_parameters_are_those_of_the_model_that_it_was(self) -> None:
        model = small_plm()
        before = model(IDS)
        qat.insert_fake_quantize(model, scheme("int8_dynamic", embedding="int8_dynamic_int8")(model=model))
        assert not torch.equal(model(IDS), before)
        assert torch.equal(reloaded(model, small_plm)(IDS), before)

    def test_switched_off_it_computes_with_the_weights_as_they_are(self) -> None:
        model = small_plm()
        before = model(IDS)
        qat.insert_fake_quantize(
            model, scheme("int8_dynamic_int4", group_size=16, embedding="int8_dynamic_int8")(model=model)
        )
        rounded = model(IDS)
        with qat.fake_quant_disabled(model):
            assert torch.equal(model(IDS), before)
        assert torch.equal(model(IDS), rounded)

    def test_a_score_head_sees_hidden_states_as_they_are(self) -> None:
        model = small_plm()
        model.add_score_head(torch.Generator().manual_seed(2))
        plan = scheme("int8_dynamic", embedding="int8_dynamic_int8")(model=model)
        assert "score" not in plan
        qat.insert_fake_quantize(model, plan)
        assert type(model.score) is nn.Linear and not model.norm._forward_hooks

    def test_under_bf16_autocast_weights_are_rounded_from_fp32(self) -> None:
        model = small_plm().eval()
        qat.insert_fake_quantize(model, scheme("int4", group_size=16)(model=model))
        layer = model.layers[0].ffn.up_proj
        with torch.autocast("cpu", torch.bfloat16):
            inside = effective_weight(layer)
            assert layer(torch.ones(1, 32)).dtype == torch.bfloat16
        assert torch.equal(inside, qat.round_as_stored(layer.weight, Format(4, 16)))

    @pytest.mark.parametrize(
        ("name", "format", "said"),
        [
            ("layers.0.ffn.gate", Format(8), "the model has no module 'layers.0.ffn.gate'"),
            ("norm", Format(8), "norm: a RMSNorm cannot be quantized"),
            ("tok_embeddings", Format(4, 48), "rows of 32 numbers cannot be divided into groups of 48"),
        ],
    )
    def test_a_plan_that_does_not_fit_is_refused(self, name: str, format: Format, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            qat.insert_fake_quantize(small_plm(), {name: format})


class TestRounding:
    @pytest.mark.parametrize("name", FORMATS)
    def test_is_that_of_quantize_bit_for_bit(self, name: str) -> None:
        format = Format.parse(name)
        weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
        weight[0], weight[1], weight[2, :16] = 0, weight[1].abs(), 1e-42  # zeros, one sign, next to nothing
        q, scales, zeros = round_weight(weight, format)
        groups = q.float().unflatten(-1, (scales.shape[-1], -1))
        expected = (groups - (0 if zeros is None else zeros[..., None])) * scales.float()[..., None]
        assert torch.equal(qat.round_as_stored(weight, format), expected.flatten(-2))

    @pytest.mark.parametrize("name", FORMATS)
    def test_gradients_are_those_of_the_rounded_weights_and_inputs(self, name: str) -> None:
        model = small_plm()
        layer_name = "layers.0.ffn.up_proj"
        format = Format.parse(name)
        qat.insert_fake_quantize(model, {layer_name: format})
        layer = model.get_submodule(layer_name)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
        out = layer(x)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        out.backward(gradient)
        seen = naive_inputs(x.detach()) if format.dynamic else x.detach()
        torch.testing.assert_close(layer.weight.grad, gradient.T @ seen)
        torch.testing.assert_close(x.grad, gradient @ qat.round_as_stored(layer.weight, format))

    def test_both_uses_of_a_tied_embedding_give_it_gradients(self) -> None:
        model = small_plm()
        qat.insert_fake_quantize(model, {"tok_embeddings": Format(4, 16)})
        weight = model.tok_embeddings.weight
        rounded = qat.round_as_stored(weight, Format(4, 16)).requires_grad_()
        model(IDS).logsumexp(-1).sum().backward()
        model = reloaded(model, small_plm)
        out = torch.func.functional_call(model, {"tok_embeddings.weight": rounded}, (IDS,))
        out.logsumexp(-1).sum().backward()
        torch.testing.assert_close(weight.grad, rounded.grad)

    def test_training_lowers_the_loss_of_the_quantized_model(self) -> None:
        model = small_plm()
        qat.insert_fake_quantize(model, scheme("int4", group_size=32, embedding="int4_g32")(model=model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            out = model(IDS[:, :-1])
            loss = nn.functional.cross_entropy(out.flatten(0, 1), IDS[:, 1:].flatten())
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model = reloaded(model, small_plm)
        quantize(model, scheme("int4", group_size=32, embedding="int4_g32")(model=model))
        out = model(IDS[:, :-1]).detach()
        assert float(nn.functional.cross_entropy(out.flatten(0, 1), IDS[:, 1:].flatten())) < losses[0] / 2


def naive_inputs(x: Tensor) -> Tensor:
    """Each row to 256 steps between its least and greatest number, one row and one number at a time."""
    out = torch.empty_like(x)
    for i, row in enumerate(x):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        scale = (high - low) / 255
        zero = min(max(-128 - round(low / scale), -128), 127)
        out[i] = torch.tensor([(min(max(round(float(v) / scale) + zero, -128), 127) - zero) * scale for v in row])
    return out


class TestOnce:
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
        model = small_plm()
        qat.insert_fake_quantize(model, {"tok_embeddings": Format(8)})
        calls: list[int] = []
        rounding = qat.round_as_stored

        def counting(weight: Tensor, format: Format) -> Tensor:
            calls.append(1)
            return rounding(weight, format)

        monkeypatch.setattr(qat, "round_as_stored", counting)
        return model, calls

    def test_micro_batches_of_a_step_share_rounded_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, calls = self.counted(monkeypatch)
        with qat.fake_quant_frozen(model):
            for _ in range(3):
                model(IDS).sum().backward()
        assert len(calls) == 1
        model(IDS)
        assert len(calls) == 3  # looked up and projected, each time

    def test_gradients_are_the_same_as_when_each_forward_rounds(self) -> None:
        gradients = []
        for context in (qat.fake_quant_frozen, qat.fake_quant_disabled, None):
            model = small_plm()
            qat.insert_fake_quantize(model, scheme("int4", group_size=16)(model=model))
            if context is None:
                model(IDS).square().sum().backward()
            else:
                with context(model):
                    model(IDS).square().sum().backward()
            gradients.append(model.layers[0].attention.q_proj.weight.grad)
        assert torch.equal(gradients[0], gradients[2]) and not torch.equal(gradients[1], gradients[2])

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_an_optimizer_step_is_seen_by_the_next_step(self, name: str) -> None:
        model = small_plm()
        qat.insert_fake_quantize(model, scheme("int4", group_size=16)(model=model))
        optimizer = build("optimizer", component("optimizer", name, lr=0.1), model=model)
        outputs = []
        for _ in range(2):
            with qat.fake_quant_frozen(model):
                out = model(IDS)
                out.square().sum().backward()
            outputs.append(out.detach())
            optimizer.step()  # fused ones write without a new version of the parameter
        assert not torch.equal(*outputs)
        model.eval()
        evaluated = model(IDS)
        assert not torch.equal(evaluated, outputs[1])
        model.train()
        optimizer.step()
        model.eval()
        assert not torch.equal(model(IDS), evaluated)

    def test_weights_that_are_loaded_while_evaluating_are_seen(self) -> None:
        model = small_plm().eval()
        qat.insert_fake_quantize(model, {"tok_embeddings": Format(8)})
        before = model(IDS)
        model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})
        assert not torch.equal(model(IDS), before)


class TestMuon:
    def test_an_untied_head_that_is_rounded_is_not_muons(self) -> None:
        model = small_llama()
        qat.insert_fake_quantize(model, scheme("int8")(model=model))
        optimizer = build("optimizer", component("optimizer", "muon"), model=model)
        matrices = {id(p) for group in optimizer.muon.param_groups for p in group["params"]}
        assert id(model.output.weight) not in matrices and id(model.tok_embeddings.weight) not in matrices


class TestNotes:
    def saved(self, directory: Path) -> Path:
        save_model(small_plm(), None, directory)
        return directory

    def test_config_json_says_what_a_model_was_trained_for(self, tmp_path: Path) -> None:
        directory = self.saved(tmp_path)
        assert qat.read_scheme(directory) is None
        noted = qat.scheme_settings(scheme("int4", group_size=16, qat=True, rules={"*.down_proj": "int8"}))
        qat.write_scheme(directory, noted)
        assert qat.read_scheme(directory) == noted
        assert noted["component"] == "int4" and noted["group_size"] == 16 and "qat" not in noted
        assert torch.equal(load_model(directory)(IDS), small_plm()(IDS))

    @pytest.mark.parametrize(
        "held",
        [7, {}, {"scheme": "int4"}, {"scheme": {"component": "int5"}}, {"scheme": {"component": "int4", "x": 1}}],
    )
    def test_what_is_no_scheme_is_refused_with_the_file(self, tmp_path: Path, held: object) -> None:
        directory = self.saved(tmp_path)
        keys = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(keys | {"qat": held}))
        with pytest.raises(UserError, match=r"config\.json, key qat"):
            qat.read_scheme(directory)
