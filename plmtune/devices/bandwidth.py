"""How fast memory is read here, on a CPU or a GPU."""

from __future__ import annotations

import torch

from plmtune.training.determinism import measure_seconds

READ_BYTES = 256 * 2**20


def read_bandwidth(device: torch.device | str = "cpu", *, threads: int | None = None) -> float:
    """Bytes/s of reading a device's memory that no cache holds; the best of a few tries.

    Args:
        threads: of the CPU; None: as torch is set.
    """
    device = torch.device(device)
    numbers = torch.ones(READ_BYTES // 4 if device.type == "cpu" else 2**28, device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        best = min(measure_seconds(numbers.sum, device) for _ in range(6))
    finally:
        torch.set_num_threads(before)
    return numbers.nbytes / best
