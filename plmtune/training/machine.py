"""What this machine has: memory for a process, FLOP/s, and the compiler that torch.compile needs."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

import psutil
import torch

from plmtune.errors import UserError
from plmtune.extras import install_command, installed

# Dense bf16 FLOP/s by the vendors' data sheets (H100, H200: SXM; RTX 4090: fp32 accumulation). The longest name counts.
BF16_PEAKS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "A10": 125e12,
}

# Of a CPU's process, measured: what a run loads before its first step (dynamo, TensorBoard, oneDNN), and what oneDNN
# keeps of the 128 shapes that plmtune.modules.linear lets it keep in bf16. matplotlib comes when activations are gone.
_LOADED_LATER, _KERNELS_IN_BF16 = 100 << 20, 90 << 20


def resident_memory() -> int:
    """Bytes of this process in memory now: mostly its libraries, and what earlier jobs of a multirun left."""
    return int(psutil.Process().memory_info().rss)


def process_memory(resident: int, compute_dtype: torch.dtype) -> int:
    """Bytes that a process on a CPU, which has `resident` of them now, holds besides the tensors of its training."""
    # Not "torch._dynamo": without_dynamo puts a stand-in there.
    later = 0 if "torch._dynamo.convert_frame" in sys.modules else _LOADED_LATER
    return resident + later + (_KERNELS_IN_BF16 if compute_dtype == torch.bfloat16 else 0)


def available_memory(device: torch.device) -> int:
    """Bytes free for this process: of the GPU, or this process's share of the machine or its container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available = psutil.virtual_memory().available
    for group, limit_file, used_file in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = _read(f"{group}/{limit_file}").strip(), _read(f"{group}/{used_file}").strip()
        if limit.isdigit() and used:  # "max": no limit
            # Page cache, which the usage counts, is given back when memory is wanted.
            lines = map(str.split, _read(f"{group}/memory.stat").splitlines())
            cached = sum(int(n) for key, n in lines if key in ("inactive_file", "active_file"))
            available = min(available, max(int(limit) - int(used) + cached, 0))
    return int(available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _read(file: str) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that `device` could do in `dtype`: MFU's denominator.

    A known GPU's bf16 peak is its data sheet's; anything else is measured by a square matrix product, so
    there MFU is a share of the speed of this machine's matrix product.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = [key for key in BF16_PEAKS if re.search(rf"\b{re.escape(key)}\b", name)]
        if known:
            return BF16_PEAKS[max(known, key=len)]
    return _measured_flops(device, dtype)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if device.type == "cuda" else 1024
    # Not random: drawing would move the generator that a resumed run must find as it left it.
    a = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    best = float("inf")
    for _ in range(6):  # the first warms up
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def check_compiler(device: torch.device, what: str, otherwise: str) -> None:
    """Refuse what torch.compile cannot compile on this machine.

    Args:
        what: the key that compiles, for the message.
        otherwise: the override that avoids it.
    """
    if device.type != "cuda":
        # Where inductor looks for it.
        name = "clang++" if sys.platform == "darwin" else "g++"
        missing = "" if os.environ.get("TORCH_INDUCTOR_INSTALL_GXX") else _missing("C++", "CXX", (name,))
    elif installed("triton"):
        missing = _missing("C", "CC", ("gcc", "clang"))  # Triton compiles what starts its kernels
    else:
        missing = f"the package triton on a GPU, which is not installed. Install it with: {install_command('triton')}"
    if missing:
        raise UserError(f"{what}: torch.compile needs {missing}. Without one: {otherwise}.")


def _missing(language: str, variable: str, names: tuple[str, ...]) -> str:
    """The middle of a sentence about a missing compiler; empty if there is one."""
    chosen = os.environ.get(variable)
    names = (chosen,) if chosen else names
    if any(shutil.which(name) for name in names):
        return ""
    package = "g++" if language == "C++" else "gcc"
    return (
        f"a {language} compiler, and {' or '.join(names)} is not on the PATH. Install one (Debian, Ubuntu: apt install "
        f"{package}), or set the environment variable {variable} to yours"
    )
