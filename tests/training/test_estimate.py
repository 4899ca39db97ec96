from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import psutil
import pytest
import torch
from live_tensors import LiveTensors
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from plmtune.models.plm import plm
from plmtune.modules.checkpointing import Checkpointing
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import lora
from plmtune.parallel.elements import held_elements
from plmtune.parallel.layout import Layout
from plmtune.registry import component
from plmtune.training import estimate as module
from plmtune.training.activations import activation_bytes
from plmtune.training.estimate import Estimate
from plmtune.training.runtime import Runtime

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
def plm_1_8b() -> Decoder:
    with torch.device("meta"):
        return plm(151936)


def estimate(
    model: Decoder,
    *,
    world_size: int = 1,
    strategy: Any = "none",
    shard_size: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Estimate:
    """Of a run on CPUs."""
    size = shard_size or (world_size if strategy == "fsdp" else 1)
    runtime = Runtime(CPU, compute_dtype, Layout(dp_replicate=world_size // size, dp_shard=size))
    return module.estimate(model, runtime, **settings)


class TestEstimate:
    def whole(self, **settings: Any) -> Estimate:
        return estimate(plm_1_8b(), optimizer="adamw", seq_len=4096, micro_batch_size=1, **settings)

    def test_of_plm_1_8b_is_the_papers_arithmetic(self) -> None:
        e = self.whole()
        assert e.parameters == 1_825_458_176
        assert e.non_embedding_parameters == 1_514_293_248
        assert e.weights == e.gradients == 4 * e.parameters
        assert e.optimizer == 8 * e.parameters
        assert e.flops_6n == 6 * e.parameters
        # 32 layers of 16 heads, 192 wide for queries and 128 for values
        assert e.flops_per_token - e.flops_6n == 12 * 32 * 16 * (192 + 128) / 2 * 4096

    def test_fsdp_divides_what_it_shards_and_holds_a_layer_or_two_whole(self) -> None:
        one, four = self.whole(), self.whole(world_size=4, strategy="fsdp")
        assert four.optimizer == one.optimizer // 4
        assert four.activations == one.activations
        layer = (one.non_embedding_parameters - 2048) // 32
        gathered = 4 * (one.parameters - 32 * layer + 2 * layer)
        assert four.weights == one.weights // 4 + gathered
        assert four.gradients == one.gradients // 4 + gathered
        assert four.tensors < one.tensors
        assert self.whole(world_size=4, strategy="ddp").tensors == one.tensors

    def test_hsdp_divides_by_the_processes_of_one_copy(self) -> None:
        eight = self.whole(world_size=8, strategy="hsdp", shard_size=4)
        four = self.whole(world_size=4, strategy="fsdp")
        assert replace(eight, available=0, process=0) == replace(four, available=0, process=0)

    def test_micro_batches_cost_fsdp_the_whole_gradient_and_the_gathered_parameters(self) -> None:
        run: dict[str, Any] = {"world_size": 4, "strategy": "fsdp", "compute_dtype": torch.bfloat16}
        e = self.whole(**run, micro_batches=2)
        assert e.gradients == 4 * e.parameters
        assert e.weights == e.parameters + 2 * e.parameters  # a quarter in fp32, all in bf16
        alone = self.whole(compute_dtype=torch.bfloat16, micro_batches=2)
        assert self.whole(**run).tensors < e.tensors < alone.tensors

    def test_fsdp_gathers_in_bf16_instead_of_casting(self) -> None:
        run: dict[str, Any] = {"compute_dtype": torch.bfloat16}
        one, four = self.whole(**run), self.whole(**run, world_size=4, strategy="fsdp")
        matrices = 2 * one.non_embedding_parameters
        assert one.activations - four.activations == pytest.approx(matrices, rel=0.01)

    def test_a_save_in_the_background_copies_weights_and_moments_on_the_host(self) -> None:
        model = small()
        run: dict[str, Any] = {"optimizer": "adamw", "seq_len": 64, "micro_batch_size": 1}
        e = estimate(model, **run, background_saves=True)
        assert e.save == 12 * e.parameters
        assert e.tensors == estimate(model, **run).tensors + e.save
        # Two files, weights and moments: the second process takes the moments.
        assert estimate(model, **run, background_saves=True, world_size=4).save == 8 * e.parameters

    def test_checkpointing_and_chunks_save_memory(self) -> None:
        one = self.whole()
        assert self.whole(activation_checkpointing="full").activations < one.activations / 4
        assert self.whole(loss_chunk_rows=0).logits - one.logits == (4096 - 1024) * 151936 * 4

    def test_an_untied_head_is_counted_and_its_input_table_costs_no_flops(self) -> None:
        tied, untied = small(), small(tie_embeddings=False)
        run: dict[str, Any] = {"optimizer": "muon", "seq_len": 64, "micro_batch_size": 1}
        a, b = estimate(tied, **run), estimate(untied, **run)
        assert b.parameters - a.parameters == 300 * 128
        assert b.non_embedding_parameters == a.non_embedding_parameters
        assert b.flops_6n == a.flops_6n

    def test_counts_the_process_and_a_share_for_the_allocator(self) -> None:
        e = estimate(small(), optimizer="adamw", seq_len=64, micro_batch_size=1)
        libraries = psutil.Process().memory_info().rss
        assert 0.2 * libraries < e.process < libraries + (200 << 20)
        assert e.total == e.process + e.tensors + e.slack > 1.05 * e.tensors
        assert [line.split()[0] for line in e.lines()][1:10] == [
            *("process", "weights", "gradients", "optimizer", "activations", "logits", "save", "slack", "total")
        ]

    def test_counts_what_the_process_has_now_not_what_it_had_at_first(self) -> None:
        run: dict[str, Any] = {"optimizer": "adamw", "seq_len": 64, "micro_batch_size": 1}
        before = estimate(small(), **run)
        held = torch.ones(64 << 20)  # as an earlier job of a multirun may leave it
        assert estimate(small(), **run).process - before.process > 200 << 20
        assert held.numel()

    def test_each_layer_keeps_the_mask_of_its_attention_as_numbers(self) -> None:
        run: dict[str, Any] = {"optimizer": "adamw", "seq_len": 64, "micro_batch_size": 2}
        masks = estimate(small(), **run, masked=True).activations - estimate(small(), **run).activations
        assert masks == 3 * 2 * 64 * 64 * 4

    def test_says_whether_it_fits(self) -> None:
        e = estimate(small(), optimizer="adamw", seq_len=64, micro_batch_size=1)
        assert e.fits
        assert any("fits" in line for line in e.lines())
        giant = Estimate(**{**e.__dict__, "weights": 10**15})
        assert not giant.fits
        assert any("does not fit" in line for line in giant.lines())


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
    def test_are_what_a_real_forward_saves(self, dtype: torch.dtype) -> None:
        model = small()
        real = measured_bytes(model, torch.zeros(2, 128, dtype=torch.long), dtype, hidden=True)
        assert activation_bytes(model, 2, 128, dtype) == pytest.approx(real, rel=0.01)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("how", ["none", "full", "selective", 2])
    def test_are_most_of_the_peak_of_a_backward(self, dtype: torch.dtype, how: Checkpointing) -> None:
        # Single operations of the backward make more, for which the estimate has its slack of a fifth.
        model = small().train()
        model.activation_checkpointing = how
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(4, 128, dtype=torch.long)
        model(ids)  # tables of RoPE are made once
        with LiveTensors() as live:
            with torch.autocast("cpu", dtype, dtype != torch.float32):
                hidden = model(ids, hidden=True)
            hidden.backward(torch.ones_like(hidden))
        found = activation_bytes(model, 4, 128, dtype, how)
        assert 0.9 * live.peak < 1.2 * found
        assert found < 1.02 * live.peak

    @pytest.mark.parametrize("how", ["selective", 2, 4])
    def test_of_other_forms_lie_between_full_and_none(self, how: Checkpointing) -> None:
        model = small(num_layers=4)
        none, full, found = (activation_bytes(model, 2, 128, torch.float32, each) for each in ("none", "full", how))
        assert full < found < none

    @pytest.mark.parametrize("group", ["attention/gqa", "ffn/swiglu", "norm/layer_norm"])
    def test_are_the_same_where_the_meta_device_finds_them(self, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
        key, _, name = group.partition("/")
        model = small(**{key: component(key, name)})
        on_cpu = activation_bytes(model, 2, 128)
        monkeypatch.setattr("plmtune.training.activations._trial_device", lambda _: torch.device("meta"))
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


class TestLayouts:
    """Estimates of the process with most parameters, against `parallel.elements`, which real processes equal."""

    @pytest.mark.parametrize(
        "layout",
        [Layout(tp=2), Layout(pp=2), Layout(pp=4, schedule="interleaved_1f1b"), Layout(tp=2, pp=2), Layout(tp=4, pp=2)],
        ids=str,
    )
    def test_weights_and_moments_are_those_that_it_holds(self, layout: Layout) -> None:
        model = plm_1_8b()
        settings: dict[str, Any] = {"optimizer": "adamw", "seq_len": 4096, "micro_batch_size": 1, "micro_batches": 8}
        found = module.estimate(model, Runtime(CPU, torch.float32, layout), **settings)
        held = max(sum(held_elements(model, layout, rank).values()) for rank in range(layout.num_processes))
        assert found.weights == pytest.approx(4 * held, rel=1e-6)
        assert found.optimizer == pytest.approx(8 * held, rel=1e-6)

    def test_a_pipeline_holds_as_many_activations_as_its_first_stage_has_micro_batches(self) -> None:
        settings: dict[str, Any] = {"optimizer": "adamw", "seq_len": 4096, "micro_batch_size": 1, "micro_batches": 8}
        one, two, interleaved, context = (
            module.estimate(plm_1_8b(), Runtime(CPU, torch.float32, layout), **settings).activations
            for layout in (Layout(), Layout(pp=2), Layout(pp=2, schedule="interleaved_1f1b"), Layout(cp=2))
        )
        assert two == one
        assert interleaved == pytest.approx(1.25 * one)
        assert context == one // 2
