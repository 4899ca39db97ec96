"""Figures of this machine for a cluster file (plmtune plan --cluster): cores, memory, and gloo between processes.

    python benchmarks/cluster_links.py --processes 4

Prints what plmtune/clusters/gloo.yaml has for one machine. Other work on the machine counts, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_ROWS = 1024
_BYTES = 32 * 2**20


def seconds(work: Callable[[], Any], repeats: int = 7) -> float:
    """Median of some runs after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(rank: int, processes: int, store: str) -> None:
    """What all processes reach at once: each has a share of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    a, b = torch.randn(_ROWS, _ROWS), torch.randn(_ROWS, _ROWS)
    dist.barrier()
    product = 2 * _ROWS**3 / seconds(lambda: a @ b) * processes
    x, y = torch.randn(_BYTES // 4), torch.empty(_BYTES // 4)
    dist.barrier()
    elements = 2 * _BYTES / seconds(lambda: y.copy_(x).relu_()) * processes
    whole, part = torch.empty(_BYTES // 4 * processes), torch.randn(_BYTES // 4)
    dist.barrier()
    gather = _BYTES * (processes - 1) / seconds(lambda: dist.all_gather_into_tensor(whole, part))
    one = torch.zeros(1)
    dist.barrier()
    latency = seconds(lambda: dist.all_reduce(one), 101) / max(1, (processes - 1).bit_length())
    found = torch.tensor([product / 1e9, 2 * elements / 1e9, gather / 1e9, latency * 1e6])
    dist.all_reduce(found)
    if rank == 0:
        names = ("products, GFLOP/s of the machine", "element-wise, GB/s of the machine",
                 "all-gather, GB/s sent by a process", "latency, us a step of a ring")  # fmt: skip
        for name, value in zip(names, (found / processes).tolist(), strict=True):
            print(f"{name:<36} {value:.4g}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    processes = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (processes, f"{folder}/store"), nprocs=processes)


if __name__ == "__main__":
    main()
