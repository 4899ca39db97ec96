"""RoPE, norms and feed-forward layers against their formulas."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from plmtune.modules.feed_forward import SquaredReLU, SwiGLU
from plmtune.modules.norm import LayerNorm, RMSNorm
from plmtune.modules.rope import RotaryEmbedding, rope_tables


class TestRotaryEmbedding:
    @pytest.mark.parametrize("interleaved", [True, False])
    def test_turns_each_pair_by_its_angle(self, interleaved: bool) -> None:
        rope = RotaryEmbedding(8, 32, theta=100.0, interleaved=interleaved)
        x = torch.randn(1, 5, 2, 8)
        out = rope(x, start=3)
        for position in range(5):
            for pair in range(4):
                a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
                angle = (position + 3) * 100.0 ** (-pair / 4)
                turned = x[0, position, :, a] * math.cos(angle) - x[0, position, :, b] * math.sin(angle)
                torch.testing.assert_close(out[0, position, :, a], turned, atol=1e-5, rtol=1e-5)
                turned = x[0, position, :, b] * math.cos(angle) + x[0, position, :, a] * math.sin(angle)
                torch.testing.assert_close(out[0, position, :, b], turned, atol=1e-5, rtol=1e-5)

    def test_tables_that_are_made_while_a_program_is_traced_hold_numbers(self) -> None:
        with FakeTensorMode():
            tables = rope_tables(8, 6, 77.0, False, torch.device("cpu"))
        assert {type(table) for table in tables} == {torch.Tensor}
        assert tables[0][0].tolist() == [1.0] * 8

    def test_positions_may_differ_by_row(self) -> None:
        rope = RotaryEmbedding(8, 32, theta=100.0, interleaved=True)
        x = torch.randn(2, 5, 2, 8)
        positions = torch.stack((torch.arange(5), torch.arange(10, 15)))
        out = rope(x, positions)
        torch.testing.assert_close(out[:1], rope(x[:1]))
        torch.testing.assert_close(out[1:], rope(x[1:], start=10))

    def test_angles_are_fp32_whatever_the_dtype(self) -> None:
        rope = RotaryEmbedding(8, 4096, theta=100000.0, interleaved=True)
        x = torch.randn(1, 1, 1, 8).to(torch.bfloat16)
        out = rope(x, start=4000)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), rope(x.float(), start=4000), atol=0.02, rtol=0.01)

    def test_an_odd_width_is_refused(self) -> None:
        with pytest.raises(ValueError, match="even and at least 2, not 5"):
            RotaryEmbedding(5, 8, theta=1.0, interleaved=True)
        with pytest.raises(ValueError, match=r"rope_theta \(0.0\) must be above 0"):
            RotaryEmbedding(4, 8, theta=0.0, interleaved=True)


class TestNorms:
    def test_rms_norm_is_its_formula(self) -> None:
        norm = RMSNorm(6, eps=0.1)
        torch.nn.init.uniform_(norm.weight)
        x = torch.randn(2, 3, 6)
        expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
        torch.testing.assert_close(norm(x), expected)

    def test_layer_norm_is_its_formula(self) -> None:
        norm = LayerNorm(6, eps=0.1)
        torch.nn.init.uniform_(norm.weight)
        torch.nn.init.uniform_(norm.bias)
        x = torch.randn(2, 3, 6)
        centred = x - x.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(norm(x), expected)

    @pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
    def test_gives_back_the_dtype_it_got(self, kind: type[RMSNorm] | type[LayerNorm]) -> None:
        x = torch.randn(2, 6).to(torch.bfloat16)
        assert kind(6)(x).dtype == torch.bfloat16


class TestSquaredReLU:
    def test_is_its_formula(self) -> None:
        ffn = SquaredReLU(8, hidden_dim=32)
        x = torch.randn(2, 3, 8)
        expected = (x @ ffn.up_proj.weight.T).clamp_min(0) ** 2 @ ffn.down_proj.weight.T
        torch.testing.assert_close(ffn(x), expected)

    def test_counts_its_zeros_only_when_asked(self) -> None:
        ffn = SquaredReLU(8, hidden_dim=32)
        x = torch.randn(2, 3, 8)
        ffn(x)
        assert ffn.sparsity is None
        ffn.record_sparsity = True
        ffn(x)
        torch.testing.assert_close(ffn.sparsity, (x @ ffn.up_proj.weight.T <= 0).float().mean(-1))


class TestSwiGLU:
    def test_is_its_formula(self) -> None:
        ffn = SwiGLU(8, hidden_dim=32)
        x = torch.randn(2, 3, 8)
        gate = x @ ffn.gate_proj.weight.T
        expected = (gate * gate.sigmoid() * (x @ ffn.up_proj.weight.T)) @ ffn.down_proj.weight.T
        torch.testing.assert_close(ffn(x), expected)
