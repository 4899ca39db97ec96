"""What a machine has: a process's share of the memory, its FLOP/s, and a compiler, whose lack is named before a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plmtune.errors import UserError
from plmtune.training.machine import available_memory, check_compiler, peak_flops

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class TestMachine:
    def test_processes_of_one_machine_share_its_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alone = available_memory(CPU)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert available_memory(CPU) == pytest.approx(alone / 4, rel=0.2)

    def test_a_cpus_peak_is_measured(self) -> None:
        assert 1e9 < peak_flops(CPU, torch.float32) < 1e14


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH."""
    for name in ("CXX", "CC", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path


def install(path: Path) -> None:
    path.touch(mode=0o755)


def check(device: torch.device) -> None:
    check_compiler(device, "key runtime.compile", "runtime.compile=false")


def test_a_cpu_needs_a_cpp_compiler_by_its_name_or_the_variable(programs, monkeypatch):
    with pytest.raises(
        UserError, match=r"^key runtime\.compile: .* C\+\+ compiler, and g\+\+ is not .* runtime\.compile=false\.$"
    ):
        check(CPU)
    monkeypatch.setenv("CXX", "my-c++")
    install(programs / "g++")
    with pytest.raises(UserError, match=r"my-c\+\+ is not on the PATH"):
        check(CPU)
    install(programs / "my-c++")
    check(CPU)
    monkeypatch.delenv("CXX")
    check(CPU)


def test_a_gpu_needs_triton_and_a_c_compiler(programs, monkeypatch):
    monkeypatch.setattr("plmtune.training.machine.installed", lambda module: False)
    with pytest.raises(UserError, match="package triton"):
        check(GPU)
    monkeypatch.setattr("plmtune.training.machine.installed", lambda module: True)
    with pytest.raises(UserError, match="a C compiler, and gcc or clang is not on the PATH"):
        check(GPU)
    install(programs / "clang")
    check(GPU)
