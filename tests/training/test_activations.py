"""The memory of activations, against what a real forward saves."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import lora
from plmtune.registry import component
from plmtune.training import activations
from plmtune.training.activations import activation_bytes

CPU = torch.device("cpu")


def small(**settings: Any) -> Decoder:
    parts: dict[str, Any] = {
        "attention": component(
            "attention", "mla", kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        "ffn": component("ffn", "squared_relu", hidden_dim=512),
        **{"embed_dim": 128, "num_layers": 3, "num_heads": 4, "max_seq_len": 256},
    }
    return plm(300, **parts | settings)


@cache
def measured_bytes(module: nn.Module, x: Tensor, dtype: torch.dtype, **settings: Any) -> int:
    """Bytes that a real forward saves for its backward."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), x)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype, dtype != torch.float32):
        pack(module(x, **settings))
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


class TestActivations:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_are_what_a_real_forward_saves(self, dtype: torch.dtype, checkpointing: bool) -> None:
        model = small()
        model.activation_checkpointing = checkpointing
        real = measured_bytes(model, torch.zeros(2, 128, dtype=torch.long), dtype, hidden=True)
        if checkpointing:  # the backward then holds one layer's tensors again
            x = torch.zeros(2, 128, 128, dtype=dtype, requires_grad=True)
            real += measured_bytes(model.layers[0], x, dtype)
        found = activation_bytes(model, 2, 128, dtype, checkpointing)
        assert found == pytest.approx(real, rel=0.12 if checkpointing else 0.01)

    @pytest.mark.parametrize("group", ["attention/gqa", "ffn/swiglu", "norm/layer_norm"])
    def test_are_the_same_where_the_meta_device_finds_them(self, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
        key, _, name = group.partition("/")
        model = small(**{key: component(key, name)})
        on_cpu = activation_bytes(model, 2, 128)
        monkeypatch.setattr(activations, "_trial_device", lambda _: torch.device("meta"))
        assert activation_bytes(model, 2, 128) == pytest.approx(on_cpu, rel=0.01)

    def test_adapters_save_no_inputs_of_what_they_leave_frozen(self) -> None:
        whole, adapted = small(), small()
        lora(adapted, rank=2)
        assert 0.3 < activation_bytes(adapted, 2, 128) / activation_bytes(whole, 2, 128) < 1

    def test_grow_with_the_tokens_and_not_with_their_square(self) -> None:
        model = small()
        one = activation_bytes(model, 1, 64)
        assert activation_bytes(model, 1, 256) == pytest.approx(4 * one, rel=0.05)
        assert activation_bytes(model, 4, 64) == pytest.approx(4 * one, rel=0.05)

    def test_leave_the_model_as_it_was(self) -> None:
        model = small()
        model.train()
        before = [p.clone() for p in model.parameters()]
        activation_bytes(model, 1, 64)
        assert model.training
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(p.grad is None for p in model.parameters())
