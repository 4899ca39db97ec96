"""Attention cores against softmax written out, and the choice of a kernel."""

import pytest
import torch

from plmtune.modules.attention_kernels import attend, choose_kernel


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


class TestAttend:
    @pytest.mark.parametrize(("s", "t"), [(9, 9), (1, 9), (4, 9)])
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("v_dim", [24, 16])
    def test_without_a_mask_the_last_query_sees_all(self, s: int, t: int, kv_heads: int, v_dim: int) -> None:
        torch.manual_seed(0)
        q, k = torch.randn(2, 4, s, 24), torch.randn(2, kv_heads, t, 24)
        v = torch.randn(2, kv_heads, t, v_dim)
        allowed = torch.ones(s, t, dtype=torch.bool).tril(t - s)
        out = attend(q, k, v, None, 0.3)
        torch.testing.assert_close(out, naive(q, k, v, allowed, 0.3), atol=1e-5, rtol=1e-5)

    def test_a_mask_is_one_a_row_for_all_heads(self) -> None:
        torch.manual_seed(0)
        q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
        mask = torch.rand(2, 6, 6) > 0.5
        mask |= torch.eye(6, dtype=torch.bool)
        out = attend(q, k, v, mask, 0.3)
        torch.testing.assert_close(out, naive(q, k, v, mask[:, None], 0.3), atol=1e-5, rtol=1e-5)


class TestChooseKernel:
    def test_values_narrower_than_queries_are_padded_on_the_cpu(self) -> None:
        assert choose_kernel(torch.device("cpu"), torch.float32, 192, 128) == "padded"

    def test_equal_widths_are_left_to_torch(self) -> None:
        assert choose_kernel(torch.device("cpu"), torch.float32, 64, 64) == "plain"

    def test_hopper_takes_them_as_they_are_unless_the_run_is_deterministic(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("plmtune.modules.attention_kernels._cudnn_supports_unequal_widths", lambda device: True)
        cuda = torch.device("cuda", 0)
        assert choose_kernel(cuda, torch.bfloat16, 192, 128) == "cudnn"
        assert choose_kernel(cuda, torch.float32, 192, 128) == "padded"
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert choose_kernel(cuda, torch.bfloat16, 192, 128) == "padded"

    def test_padding_reaches_the_fused_kernel(self) -> None:
        q, v = torch.randn(1, 2, 8, 24), torch.randn(1, 2, 8, 16)
        with torch.profiler.profile() as profile:
            attend(q, q, v, None, 1.0)
        assert any("flash_attention_for_cpu" in event.key for event in profile.key_averages())
