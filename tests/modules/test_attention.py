"""Attention cores against softmax written out, and the choice of a kernel."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from plmtune.modules.attention import (
    _KERNEL_NAMES,
    GroupedQueryAttention,
    MultiHeadLatentAttention,
    attend,
    choose_kernel,
    kernel_names,
)


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
        monkeypatch.setattr("plmtune.modules.attention._cudnn_takes_unequal_widths", lambda device: True)
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


def names(model: torch.nn.Module, dtype: torch.dtype = torch.float32, masked: bool = False, seq_len: int = 40) -> str:
    return kernel_names(model, seq_len=seq_len, dtype=dtype, device=torch.device("cpu"), masked=masked)


class TestKernelNames:
    @pytest.fixture
    def mla(self) -> MultiHeadLatentAttention:
        with torch.device("meta"):
            return MultiHeadLatentAttention(
                32, 2, 64, nn.RMSNorm, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
            )

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_names_what_the_profiler_sees(
        self, mla: MultiHeadLatentAttention, dtype: torch.dtype, masked: bool
    ) -> None:
        assert names(mla, dtype, masked) == "flash for CPUs, values padded from 16 to 24"
        real = mla.to_empty(device="cpu").to(dtype)
        mask = torch.ones(1, 40, 40, dtype=torch.bool).tril() if masked else None
        with torch.profiler.profile() as profile:
            real(torch.zeros(1, 40, 32, dtype=dtype), mask=mask)
        assert any("flash_attention_for_cpu" in event.key for event in profile.key_averages())

    def test_attention_that_no_fused_kernel_takes_is_called_unfused(self, mla: MultiHeadLatentAttention) -> None:
        with sdpa_kernel([SDPBackend.MATH]):
            assert names(mla).startswith("unfused")
        # Left to torch, unequal widths reach no fused kernel on a CPU: that is why values are padded.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("plmtune.modules.attention.choose_kernel", lambda *arguments: "plain")
            assert names(mla) == "unfused"

    def test_each_shape_of_head_is_named_once(self, mla: MultiHeadLatentAttention) -> None:
        other = GroupedQueryAttention(32, 4, 64, nn.RMSNorm, num_kv_heads=2)
        assert names(nn.ModuleList([mla, other, mla])) == "flash for CPUs, values padded from 16 to 24; flash for CPUs"

    def test_a_model_with_an_attention_of_its_own_is_said_to_have_one(self) -> None:
        assert names(nn.Linear(2, 2)) == "the model's own"

    def test_a_long_sequence_is_tried_short_and_draws_no_random_number(self, mla: MultiHeadLatentAttention) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        with torch.profiler.profile(record_shapes=True) as profile:
            names(mla, masked=True, seq_len=1_000_001)
        rows = [e.input_shapes[0][2] for e in profile.events() if e.name == "aten::scaled_dot_product_attention"]
        assert rows == [512 + 1_000_001 % 512]
        assert torch.equal(torch.get_rng_state(), before)

    def test_torch_still_names_the_nodes_of_every_kernel_so(self) -> None:
        for name in _KERNEL_NAMES:
            assert hasattr(torch._C._functions, f"{name}Backward0"), name
