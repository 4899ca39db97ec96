"""Decoding one token: the fast roads of bf16 on a CPU give what the plain ones give."""

import pytest
import torch

from plmtune.modules.linear import Linear
from plmtune.modules.mla import MultiHeadLatentAttention, _attend_latent
from plmtune.modules.norm import RMSNorm


class TestLinear:
    def test_a_row_of_bf16_is_summed_in_fp32(self) -> None:
        torch.manual_seed(0)
        layer = Linear(4096, 24, bias=False).to(torch.bfloat16).requires_grad_(False)
        x = torch.randn(1, 1, 4096).to(torch.bfloat16)
        exact = x.double() @ layer.weight.double().t()
        torch.testing.assert_close(layer(x).double(), exact, atol=1e-3, rtol=2**-8)


class TestAttendLatent:
    @pytest.mark.parametrize("t", [5, 512, 1027])
    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_parts_of_a_cache_are_joined_to_the_softmax_over_all(self, t: int, threads: int) -> None:
        torch.manual_seed(0)
        query, kept = torch.randn(1, 4, 24), torch.randn(1, t, 24)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            with torch.no_grad():
                found = _attend_latent(query, kept, None, 0.3)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found, torch.softmax(query @ kept.transpose(1, 2) * 0.3, -1) @ kept)

    def test_a_mask_hides_tokens_of_its_row(self) -> None:
        torch.manual_seed(0)
        query, kept = torch.randn(2, 4, 24), torch.randn(2, 9, 24)
        mask = torch.tensor([[[True] * 5 + [False] * 4], [[True] * 9]])
        found = _attend_latent(query, kept, mask, 0.3)
        torch.testing.assert_close(found[:1], _attend_latent(query[:1], kept[:1, :5], None, 0.3))
        torch.testing.assert_close(found[1:], _attend_latent(query[1:], kept[1:], None, 0.3))


class TestLatentDecode:
    @pytest.mark.parametrize("rows", [1, 3])
    def test_bf16_is_fp32_up_to_its_rounding(self, rows: int) -> None:
        torch.manual_seed(0)
        mla = MultiHeadLatentAttention(
            32, 4, 64, RMSNorm, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ).requires_grad_(False)
        mla = mla.to(torch.bfloat16)
        q_nope, q_rope = torch.randn(rows, 4, 8).bfloat16(), torch.randn(rows, 4, 4).bfloat16()
        kept = torch.randn(rows, 40, 20).bfloat16()
        mask = torch.ones(rows, 1, 40, dtype=torch.bool)
        with torch.no_grad():
            found = [mla._decode(q_nope, q_rope, kept, given) for given in (None, mask)]
            exact = mla.float()._decode(q_nope.float(), q_rope.float(), kept.float(), None)
        for heads in found:
            torch.testing.assert_close(heads.float(), exact, atol=2e-2, rtol=2e-2)
