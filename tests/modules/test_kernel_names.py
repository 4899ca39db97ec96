"""The name of the attention kernel is that of the operation that ran."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from plmtune.modules.gqa import GroupedQueryAttention
from plmtune.modules.kernel_names import _KERNEL_NAMES, kernel_names
from plmtune.modules.mla import MultiHeadLatentAttention


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

    def test_attention_without_a_fused_kernel_is_called_unfused(self, mla: MultiHeadLatentAttention) -> None:
        with sdpa_kernel([SDPBackend.MATH]):
            assert names(mla).startswith("unfused")
        # Left to torch, unequal widths reach no fused kernel on a CPU: that is why values are padded.
        with pytest.MonkeyPatch.context() as patch:
            for module in ("attention_kernels", "kernel_names"):
                patch.setattr(f"plmtune.modules.{module}.choose_kernel", lambda *arguments: "plain")
            assert names(mla) == "unfused"

    def test_each_shape_of_head_is_named_once(self, mla: MultiHeadLatentAttention) -> None:
        other = GroupedQueryAttention(32, 4, 64, nn.RMSNorm, num_kv_heads=2)
        assert names(nn.ModuleList([mla, other, mla])) == "flash for CPUs, values padded from 16 to 24; flash for CPUs"

    def test_a_model_without_our_attention_is_named_so(self) -> None:
        assert names(nn.Linear(2, 2)) == "the model's own"

    def test_a_long_sequence_is_shortened_and_no_random_number_is_drawn(self, mla: MultiHeadLatentAttention) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        with torch.profiler.profile(record_shapes=True) as profile:
            names(mla, masked=True, seq_len=1_000_001)
        rows = [e.input_shapes[0][2] for e in profile.events() if e.name == "aten::scaled_dot_product_attention"]
        assert rows == [512 + 1_000_001 % 512]
        assert torch.equal(torch.get_rng_state(), before)

    def test_torch_has_a_node_of_every_name(self) -> None:
        for name in _KERNEL_NAMES:
            assert hasattr(torch._C._functions, f"{name}Backward0"), name
