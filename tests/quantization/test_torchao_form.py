"""torchao's tensors hold our integers, so that what is exported is what was measured."""

from typing import Any

import pytest
import torch
from small import IDS, MODELS, small_llama, small_plm
from torchao.quantization import IntxUnpackedToInt8Tensor

from plmtune.modules.quantized import Format, QuantizedLinear, round_inputs
from plmtune.quantization.quantize import quantize
from plmtune.quantization.schemes import int4, int8, int8_dynamic, int8_dynamic_int4
from plmtune.quantization.torchao_form import to_torchao

SCHEMES = {"int8": int8, "int4": int4, "int8_dynamic": int8_dynamic, "int8_dynamic_int4": int8_dynamic_int4}
EMBEDDINGS = ["int8", "int4_g32", "int8_dynamic_int8", "int8_dynamic_int4_g32"]


def quantized(make: Any, scheme: str, embedding: str) -> Any:
    model = make()
    quantize(model, SCHEMES[scheme](model, embedding=embedding))
    return model


class TestToTorchao:
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
