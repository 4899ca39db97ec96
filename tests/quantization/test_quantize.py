"""The integers of a model: those of torchao, or with calibration ones that err less."""

from typing import Any

import pytest
import torch
from small import IDS, MODELS, small_llama, small_plm
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    PerAxis,
    PerGroup,
)
from torchao.quantization.quant_api import quantize_ as torchao_quantize

from plmtune.errors import UserError
from plmtune.modules.quantized import Format, Quantized, QuantizedLinear, round_inputs
from plmtune.quantization.quantize import bounds, fill, quantize, round_weight, to_torchao
from plmtune.quantization.schemes import int4, int8, int8_dynamic, int8_dynamic_int4

SCHEMES = {"int8": int8, "int4": int4, "int8_dynamic": int8_dynamic, "int8_dynamic_int4": int8_dynamic_int4}
EMBEDDINGS = ["int8", "int4_g32", "int8_dynamic_int8", "int8_dynamic_int4_g32"]
NAMES = ["int8", "int8_dynamic_int8", "int4_g32", "int4_g16", "int8_dynamic_int4_g32", "int8_g32"]
FOUR_BITS = ["int4_g32", "int8_dynamic_int4_g32"]
THEIRS = {
    "int8": Int8WeightOnlyConfig(set_inductor_config=False),
    "int8_dynamic_int8": Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0)),
    "int8_dynamic_int4_g32": Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)),  # type: ignore[attr-defined]
}


def drawn(rows: int = 24, width: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.3


def held(weight: Tensor, format: Format, moments: Tensor | None = None) -> QuantizedLinear:
    module = QuantizedLinear(weight.shape[1], weight.shape[0], format)
    fill(module, *round_weight(weight, format, moments), dtype=torch.float32)
    return module


class TestNumbers:
    @pytest.mark.parametrize("name", THEIRS)
    def test_equal_those_of_torchao_but_for_scales_in_bf16(self, name: str) -> None:
        format, weight = Format.parse(name), drawn()
        linear = nn.Linear(96, 24, bias=False)
        linear.weight = nn.Parameter(weight.clone())
        torchao_quantize(linear, THEIRS[name])
        theirs: Any = linear.weight
        q, scales, zeros = round_weight(weight, format)
        assert zeros is None
        assert torch.equal(scales, theirs.scale.bfloat16())
        # Half a bf16 step of a scale moves a number of 127 by half of one.
        assert (q.int() - theirs.qdata.int()).abs().max() <= 1
        assert (q == theirs.qdata).float().mean() > 0.8

    @pytest.mark.parametrize("name", THEIRS)
    def test_equal_those_of_torchao_where_its_scales_are_bf16_numbers(self, name: str) -> None:
        format, weight = Format.parse(name), drawn()
        low, high = bounds(format)
        weight.unflatten(1, (-1, format.group_size or 96))[..., 0] = (high - low) / 2 * 2.0**-6
        weight.clamp_(-(high - low) / 2 * 2.0**-6, (high - low) / 2 * 2.0**-6)
        linear = nn.Linear(96, 24, bias=False)
        linear.weight = nn.Parameter(weight.clone())
        torchao_quantize(linear, THEIRS[name])
        theirs: Any = linear.weight
        q, scales, _ = round_weight(weight, format)
        assert torch.equal(scales.float(), theirs.scale) and scales.unique().tolist() == [2.0**-6]
        assert torch.equal(q, theirs.qdata)

    @pytest.mark.parametrize("name", NAMES)
    def test_stand_within_half_a_step_of_the_weight_but_at_the_ends(self, name: str) -> None:
        format, weight = Format.parse(name), drawn()
        module = held(weight, format)
        steps = module.scales.repeat_interleave(96 // module.scales.shape[1], dim=1)
        inside = (module.integers() > bounds(format)[0]) & (module.integers() < bounds(format)[1])
        error = (module.dequantize() - weight).abs() / steps
        assert error[inside].max() <= 0.5001
        assert error.max() <= 1.01

    def test_are_asymmetric_of_4_bits_alone(self) -> None:
        weight = drawn().abs() + 0.1  # no number below zero: half of a symmetric range would be lost
        q, _, zeros = round_weight(weight, Format(4, 32))
        assert zeros is not None and not zeros.any()
        assert set(q.unique().tolist()) <= set(range(16)) and q.max() == 15

    @pytest.mark.parametrize("name", NAMES)
    def test_zeros_stay_zeros(self, name: str) -> None:
        weight = drawn()
        weight[3] = 0
        weight[:, 5] = 0
        module = held(weight, Format.parse(name))
        assert not module.dequantize()[3].any() and not module.dequantize()[:, 5].any()

    def test_do_not_depend_on_how_many_rows_are_worked_on_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = round_weight(drawn(), Format(4, 32))
        monkeypatch.setattr("plmtune.quantization.quantize._CHUNK", 5 * 96)
        for one, other in zip(whole, round_weight(drawn(), Format(4, 32)), strict=True):
            assert one is not None and other is not None and torch.equal(one, other)


class TestCalibration:
    @pytest.mark.parametrize("name", FOUR_BITS)
    def test_makes_products_err_less(self, name: str) -> None:
        format, weight = Format.parse(name), drawn(64, 128)
        # Some columns matter a hundred times more, and inputs do not depend on each other.
        spread = torch.ones(128).index_fill_(0, torch.arange(0, 128, 9), 10.0)
        x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(1)) * spread
        moments = x.square().mean(0)
        errors = [
            float((x @ (held(weight, format, given).dequantize() - weight).T).square().mean())
            for given in (None, moments)
        ]
        assert errors[1] < 0.8 * errors[0]

    @pytest.mark.parametrize("name", FOUR_BITS)
    def test_never_makes_a_group_err_more(self, name: str) -> None:
        format, weight = Format.parse(name), drawn()
        moments = torch.rand(96, generator=torch.Generator().manual_seed(2)) ** 4
        plain, searched = (
            ((held(weight, format, given).dequantize() - weight).square() * moments).unflatten(1, (-1, 32)).sum(-1)
            for given in (None, moments)
        )
        assert (searched <= plain * 1.0001).all()
        assert (searched < plain).float().mean() > 0.5

    def test_scales_are_bf16_numbers_that_the_integers_were_chosen_for(self) -> None:
        weight, moments = drawn(), torch.ones(96)
        q, scales, zeros = round_weight(weight, Format(4, 32), moments)
        assert zeros is not None and scales.dtype == torch.bfloat16
        steps = weight.unflatten(1, (-1, 32)) / scales.float()[..., None]
        wanted = (steps + zeros[..., None]).round().clamp(0, 15)
        assert (wanted - q.unflatten(1, (-1, 32))).abs().max() <= 1
        assert (wanted == q.unflatten(1, (-1, 32))).float().mean() > 0.999


class TestQuantize:
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_8_bits_say_nearly_what_the_model_said(self, make: Any) -> None:
        model = make()
        with torch.no_grad():
            before = model(IDS)
            quantize(model, int8(model))
            after = model(IDS)
        assert (after.softmax(-1) - before.softmax(-1)).abs().max() < 0.03
        assert not torch.equal(before, after)

    def test_a_model_says_what_its_numbers_written_out_say(self) -> None:
        model: Any = small_llama()
        plain: Any = small_llama()
        plan = int4(model)
        quantize(model, plan)
        for name in plan:
            module: Any = model.get_submodule(name)
            plain.get_submodule(name).weight.data.copy_(module.dequantize())
        with torch.no_grad():
            torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-5, atol=1e-5)

    def test_what_the_plan_leaves_out_is_not_touched(self) -> None:
        model = small_llama()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        quantize(model, {"layers.0.ffn.up_proj": Format(8), "layers.1.attention.q_proj": Format(8)})
        assert [name for name, m in model.named_modules() if isinstance(m, Quantized)] == [
            "layers.0.ffn.up_proj",
            "layers.1.attention.q_proj",
        ]
        after = model.state_dict()
        changed = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
        assert changed == {"layers.0.ffn.up_proj.weight", "layers.1.attention.q_proj.weight"}  # no bias

    def test_floating_weights_are_gone_and_scales_have_their_dtype(self) -> None:
        model: Any = small_plm().bfloat16()
        quantize(model, int8_dynamic_int4(model), scheme={"component": "int8_dynamic_int4"})
        assert {p.ndim for p in model.parameters()} == {1}
        assert all(m.scales.dtype == torch.bfloat16 for m in model.modules() if isinstance(m, Quantized))
        assert model.quantization == {"component": "int8_dynamic_int4"}
        assert model(IDS).isfinite().all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_weight_that_is_no_number_is_refused_by_name(self, bad: float) -> None:
        model = small_plm()
        model.get_parameter("layers.1.ffn.up_proj.weight").data[7, 3] = bad
        with pytest.raises(UserError, match=r"layers\.1\.ffn\.up_proj\.weight holds numbers that are not finite"):
            quantize(model, int8(model))

    def test_a_module_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"no module 'layers\.9\.ffn'"):
            quantize(small_plm(), {"layers.9.ffn": Format(8)})


def quantized(make: Any, scheme: str, embedding: str) -> Any:
    model = make()
    quantize(model, SCHEMES[scheme](model, embedding=embedding))
    return model


class TestToTorchao:
    """torchao's tensors hold our integers, so that what is exported is what was measured."""

    @torch.no_grad()
    @pytest.mark.parametrize(("scheme", "embedding"), zip(SCHEMES, EMBEDDINGS, strict=True))
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_numbers_are_the_same_bit_for_bit(self, make: Any, scheme: str, embedding: str) -> None:
        model = quantized(make, scheme, embedding)
        numbers = {name: m.dequantize() for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        to_torchao(model)
        assert not [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        for name, number in numbers.items():
            weight: Any = model.get_submodule(name).weight
            assert isinstance(weight, IntxUnpackedToInt8Tensor)
            assert torch.equal(weight.dequantize(), number)
            assert (weight.activation_quantization is not None) == (
                "dynamic" in (embedding if name == "output" else scheme)
            )

    @torch.no_grad()
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    @pytest.mark.parametrize("scheme", ["int8", "int4"])
    def test_a_model_of_weights_alone_says_the_same(self, make: Any, scheme: str) -> None:
        model = quantized(make, scheme, "int8")
        before = model(IDS)
        to_torchao(model)
        torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["int8_dynamic_int8", "int8_dynamic_int4_g32"])
    def test_a_layer_that_rounds_its_inputs_says_the_same_but_for_ties(self, name: str) -> None:
        model = small_llama()
        quantize(model, {"layers.0.ffn.up_proj": Format.parse(name)})
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
        layer: Any = model.get_submodule("layers.0.ffn.up_proj")
        before, step = layer(x), float((round_inputs(x) - x).abs().max()) * 2
        most = float(layer.dequantize().abs().max())
        to_torchao(model)
        difference = (model.get_submodule("layers.0.ffn.up_proj")(x) - before).abs()
        assert difference.max() <= step * most * 1.001  # one input on the other side of a tie
        assert (difference.amax(-1) < 1e-5).float().mean() >= 0.8

    @pytest.mark.slow
    def test_a_step_can_be_exported(self) -> None:
        model = quantized(small_plm, "int8_dynamic_int4", "int8_dynamic_int8")
        to_torchao(model)
        program = torch.export.export(model, (IDS[:1],), strict=False)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(IDS[:1]), model(IDS[:1]), rtol=0, atol=1e-4)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert {"torchao.choose_qparams_affine.default", "torchao.dequantize_affine.default"} <= called
