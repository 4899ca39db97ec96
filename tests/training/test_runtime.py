"""What the runtime chooses, that it says so, and that seeds make runs equal."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from toy import Toy, global_batch, train_step

from plmtune.errors import UserError
from plmtune.training.runtime import Runtime, peak_memory_bytes


def start(**keys) -> Runtime:
    return Runtime.choose(**{"device": "cpu", "precision": "fp32", **keys}).start()


class TestChoices:
    def test_what_was_asked_for_is_taken_and_printed(self):
        runtime = start(precision="bf16")
        assert runtime.compute_dtype == torch.bfloat16
        assert "precision: bf16 (asked for)" in runtime.reasons

    @pytest.mark.parametrize("units", [True, False])
    def test_auto_precision_follows_the_hardware_and_says_why(self, monkeypatch, units):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        runtime = start(precision="auto")
        assert runtime.compute_dtype == (torch.bfloat16 if units else torch.float32)
        reason = "this CPU has AMX" if units else "neither AMX nor AVX512-BF16"
        assert any(reason in line for line in runtime.reasons)

    def test_auto_device_without_a_gpu_is_the_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        runtime = start(device="auto")
        assert runtime.device.type == "cpu"
        assert "no GPU found" in runtime.reasons[0]

    @pytest.mark.parametrize("strategy", ["auto", "none", "ddp", "fsdp", "hsdp"])
    def test_one_process_is_not_wrapped(self, strategy):
        runtime = start(strategy=strategy)
        model = Toy()
        assert runtime.strategy == "none"
        assert runtime.distribute(model) is model

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"device": "tpu9000"}, "device=tpu9000 is no device"),
            ({"device": "meta"}, "device=meta is not supported"),
            ({"device": "cuda:99"}, "device=cuda:99 needs GPU 99"),
            ({"precision": "fp8"}, "precision=fp8 is unknown"),
            ({"strategy": "zero"}, "strategy=zero is unknown"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, keys, message):
        with pytest.raises(UserError, match=message):
            start(**keys)

    def test_several_processes_cannot_train_apart(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(UserError, match="strategy=none cannot train one model on 4 processes"):
            start(strategy="none")

    def test_one_process_needs_no_shard_size_that_fits(self):
        assert start(strategy="hsdp", shard_size=4).strategy == "none"

    @pytest.mark.parametrize(
        ("size", "machine", "message"),
        [
            (3, "2", "shard_size=3 does not divide 8 processes"),
            (0, "2", "shard_size=0 does not divide 8 processes"),
            (1, "2", "shard_size=1 shards nothing, which is ddp. Use strategy=ddp."),
            (8, "2", "shard_size=8 makes one copy of all, which is fsdp. Use strategy=fsdp."),
            (None, "8", "shard_size=8, the processes of this machine, makes one copy of all.* give shard_size"),
            (None, "3", "shard_size=3, the processes of this machine, does not divide 8"),
        ],
    )
    def test_copies_that_the_processes_do_not_make_are_refused(self, monkeypatch, size, machine, message):
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", machine)
        with pytest.raises(UserError, match=message):
            start(strategy="hsdp", shard_size=size)

    def test_a_shard_size_without_hsdp_is_refused(self):
        with pytest.raises(UserError, match="shard_size=2 belongs to strategy=hsdp"):
            start(strategy="fsdp", shard_size=2)


class TestSeeds:
    def test_one_seed_fixes_all_generators(self):
        def draw(seed: int) -> tuple[float, float, float]:
            start(seed=seed)
            return torch.rand(1).item(), float(np.random.rand()), random.random()

        assert draw(7) == draw(7)
        assert all(a != b for a, b in zip(draw(7), draw(8), strict=True))

    def test_deterministic_is_switched_on_and_off(self):
        start(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        start()
        assert not torch.are_deterministic_algorithms_enabled()


class TestStep:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return Toy()

    def test_micro_batches_give_the_gradient_of_the_whole_batch(self, model):
        whole = Toy()
        whole.load_state_dict(model.state_dict())
        runtime = start()
        tokens, targets = global_batch(0)
        loss = torch.nn.functional.cross_entropy(whole(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        expected = [p.grad.clone() for p in whole.parameters()]
        caught: list[torch.Tensor] = []

        class Catch(torch.optim.SGD):
            def step(self, closure=None):
                caught.extend(p.grad.clone() for p in model.parameters())

        measured, _ = train_step(runtime, model, model, Catch(model.parameters(), lr=0.0), 0)
        assert measured == pytest.approx(loss.item(), rel=1e-6)
        norm = torch.stack([g.norm() for g in expected]).norm()
        scale = min(1.0, 1.0 / (norm.item() + 1e-6))
        for found, wanted in zip(caught, expected, strict=True):
            torch.testing.assert_close(found, wanted * scale, rtol=1e-5, atol=1e-7)

    def test_the_norm_is_that_before_clipping_and_none_only_measures(self, model):
        runtime = start()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        count = sum(p.numel() for p in model.parameters())
        assert runtime.clip_grad_norm(model, None).item() == pytest.approx(count**0.5)
        assert runtime.clip_grad_norm(model, 0.5).item() == pytest.approx(count**0.5)
        assert runtime.clip_grad_norm(model, None).item() == pytest.approx(0.5, rel=1e-4)

    def test_sums_are_in_fp64(self):
        assert start().sum(2**53, torch.tensor(1.5)) == (float(2**53), 1.5)

    def test_autocast_computes_in_bf16_and_keeps_parameters_in_fp32(self, model):
        runtime = start(precision="bf16")
        with runtime.autocast():
            out = model.layers[0].up(torch.ones(2, 16))
        assert out.dtype == torch.bfloat16
        assert model.layers[0].up.weight.dtype == torch.float32

    def test_blocks_are_compiled_one_by_one(self, model, monkeypatch):
        compiled: list[torch.nn.Module] = []
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
        start().distribute(model, compile=True)
        assert compiled == list(model.layers)


def test_peak_memory_is_at_least_what_is_held_and_never_falls():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(32 * 2**20, dtype=torch.uint8)
    after = peak_memory_bytes(torch.device("cpu"))
    assert after >= before >= held.nbytes
