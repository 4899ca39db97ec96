"""What a machine has: a process's share of the memory, and its FLOP/s."""

from __future__ import annotations

import pytest
import torch

from plmtune.training.machine import available_memory, peak_flops

CPU = torch.device("cpu")


class TestMachine:
    def test_processes_of_one_machine_share_its_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alone = available_memory(CPU)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert available_memory(CPU) == pytest.approx(alone / 4, rel=0.2)

    def test_a_cpus_peak_is_measured(self) -> None:
        assert 1e9 < peak_flops(CPU, torch.float32) < 1e14
