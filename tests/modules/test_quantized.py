"""Formats and the layers that hold them."""

import pytest
import torch
from torch import nn

from plmtune.modules.quantized import Format, QuantizedEmbedding, QuantizedLinear, install, round_inputs


class TestFormat:
    @pytest.mark.parametrize(
        "name", ["int8", "int8_g64", "int4_g32", "int4", "int8_dynamic_int8", "int8_dynamic_int4_g128"]
    )
    def test_has_a_name_that_says_it_all(self, name: str) -> None:
        assert Format.parse(name).name == name

    @pytest.mark.parametrize("name", ["", "int2", "int8_g0", "int8_g8", "int4_g20", "int8_dynamic", "int8 ", "INT8"])
    def test_another_name_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"no format|multiple of 16"):
            Format.parse(name)

    @pytest.mark.parametrize("name", ["int8", "int4_g32", "int8_dynamic_int8", "int8_dynamic_int4_g64"])
    def test_num_bytes_is_what_a_layer_holds_with_scales_in_bf16(self, name: str) -> None:
        layer = QuantizedLinear(128, 48, Format.parse(name)).to(torch.bfloat16)
        assert Format.parse(name).num_bytes((48, 128)) == sum(buffer.nbytes for buffer in layer.buffers())


class TestQuantized:
    def test_numbers_are_q_minus_zero_times_scale(self) -> None:
        layer = QuantizedLinear(32, 2, Format(4, 16))
        layer.weight.random_(0, 256)
        layer.scales.uniform_(0.1, 0.2)
        layer.zeros.random_(0, 16)
        for row in range(2):
            for column in range(32):
                byte = int(layer.weight[row, column // 2])
                q, group = byte >> 4 if column % 2 else byte & 15, column // 16
                expected = (q - int(layer.zeros[row, group])) * layer.scales[row, group]
                assert layer.dequantize()[row, column] == expected

    def test_four_bits_without_zeros_are_minus_8_to_7(self) -> None:
        layer = QuantizedLinear(16, 1, Format(4, 16, dynamic=True))
        layer.weight[:] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
        assert layer.integers().tolist() == [list(range(-8, 8))]

    def test_casting_there_and_back_changes_nothing(self) -> None:
        layer = QuantizedLinear(64, 8, Format(4, 32))
        layer.scales = torch.rand(8, 2).to(torch.bfloat16).float()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        after = layer.to(torch.bfloat16).float().state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    def test_rows_that_cannot_be_divided_are_refused(self) -> None:
        with pytest.raises(ValueError, match="rows of 40 numbers cannot be divided into groups of 32"):
            QuantizedEmbedding(10, 40, Format(4, 32))

    def test_an_embedding_is_its_rows_and_projects_by_them(self) -> None:
        embedding = QuantizedEmbedding(10, 32, Format(8))
        embedding.weight.random_(-128, 128)
        embedding.scales.uniform_(0.1, 0.2)
        table, ids, hidden = embedding.dequantize(), torch.tensor([[3, 9], [0, 3]]), torch.randn(2, 32)
        assert torch.equal(embedding(ids), table[ids])
        assert torch.equal(embedding.project(hidden), hidden @ table.T)


class TestRoundInputs:
    def test_each_token_has_256_steps_of_its_own_with_zero_among_them(self) -> None:
        x = torch.stack((torch.linspace(-1, 3, 1000), torch.linspace(50, 100, 1000), torch.zeros(1000)))
        rounded = round_inputs(x)
        bounds = torch.tensor([4 / 255 / 2, 100 / 255 / 2, 0.0]) * 1.01
        assert ((rounded - x).abs().amax(-1) <= bounds).all()
        assert [len(row.unique()) for row in rounded] == [256, 128, 1]  # 50 of 100 is step 127.5, which rounds to 128
        assert torch.equal(round_inputs(torch.tensor([[0.0, 5.0]]))[:, 0], torch.zeros(1))


class TestInstall:
    def test_layers_keep_their_place_and_bias(self) -> None:
        model = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 16, bias=True), nn.Linear(16, 16)).to("meta")
        install(model, {"0": Format(8), "1": Format(4, 32)})
        assert isinstance(model[0], QuantizedEmbedding) and isinstance(model[1], QuantizedLinear)
        assert model[1].bias is not None and model[1].weight.is_meta and type(model[2]) is nn.Linear

    def test_what_cannot_be_quantized_is_named(self) -> None:
        model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
        for name, message in {
            "0": "0: a LayerNorm cannot",
            "1": "1: a ReLU cannot",
            "7": "no module '7'",
            "": "cannot",
        }.items():
            with pytest.raises(ValueError, match=message):
                install(model, {name: Format(8)})
