"""Our chunked loss against all logits at once, at a 152k vocabulary: peak memory and time.

    python benchmarks/loss.py            4,096 tokens x 512 x 151,936 in fp32, forward and backward
    python benchmarks/loss.py --quick    half the tokens, one round

Each side runs in its own process, as peak memory only grows; the order alternates from round to round. Peak
is the process's highest resident memory above what it held with its inputs made, gradients included.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.training.runtime import peak_memory_bytes

VOCAB, WIDTH = 151936, 512
CPU = torch.device("cpu")
SIDES = ("chunked", "full")


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def one_side(side: str, tokens: int, chunk_rows: int, repeats: int) -> None:
    """Run in a child: print seconds of each repeat after the first, and the peak in bytes."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = torch.empty(VOCAB, WIDTH).normal_(0, 0.02).requires_grad_()
    targets = torch.randint(VOCAB, (tokens,))
    loss = cross_entropy(chunk_rows=chunk_rows) if side == "chunked" else full
    baseline = peak_memory_bytes(CPU)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        value = loss(hidden, weight, targets)
        value.backward()
        times.append(time.perf_counter() - start)
        hidden.grad = weight.grad = None
    print(json.dumps({"seconds": times[1:], "peak": peak_memory_bytes(CPU) - baseline, "loss": value.item()}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Chunked loss against all logits at once.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--chunk-rows", type=int, default=1024)
    parser.add_argument("--side", choices=SIDES, help="internal: run one side in this process")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    tokens, rounds, repeats = (2048, 1, 1) if options.quick else (4096, 3, 2)
    chunk_rows = options.chunk_rows
    torch.set_num_threads(options.threads)
    if options.side:
        one_side(options.side, tokens, chunk_rows, repeats)
        return
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {options.threads} threads, torch {torch.__version__}, python {platform.python_version()}")
    print(f"{tokens} tokens x {WIDTH} x {VOCAB}, fp32")
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, list[int]] = {side: [] for side in SIDES}
    for index in range(rounds):
        for side in SIDES if index % 2 == 0 else reversed(SIDES):
            command = [sys.executable, __file__, "--side", side, "--threads", str(options.threads)]
            command += ["--chunk-rows", str(chunk_rows), *(["--quick"] if options.quick else [])]
            result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            seconds[side] += result["seconds"]
            peaks[side].append(result["peak"])
            print(f"  {side:<8} {result['seconds'][0]:.2f} s, peak {result['peak'] / 2**20:.0f} MiB", flush=True)
    time_of = {side: statistics.median(seconds[side]) for side in SIDES}
    peak_of = {side: statistics.median(peaks[side]) for side in SIDES}
    print("| loss | seconds | peak MiB |\n|---|---|---|")
    for side in SIDES:
        name = f"ours, {chunk_rows} rows" if side == "chunked" else "all logits"
        print(f"| {name} | {time_of[side]:.2f} | {peak_of[side] / 2**20:.0f} |")
    print(f"| ratio | {time_of['chunked'] / time_of['full']:.2f} | {peak_of['chunked'] / peak_of['full']:.2f} |")


if __name__ == "__main__":
    main()
