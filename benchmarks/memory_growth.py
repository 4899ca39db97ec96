"""Memory of a process that trains on texts of ever new lengths in bf16 on a CPU, with and without bounded caches.

python benchmarks/memory_growth.py [--steps 400]
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from side_by_side import machine

from plmtune.models.plm import plm
from plmtune.modules.segments import Segments
from plmtune.registry import component

# What torch and oneDNN do by themselves, and what plmtune.modules.linear sets.
UNBOUNDED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
SEQ_LEN, ROWS, VOCABULARY = 512, 2, 512


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(steps: int, precision: str) -> None:
    """Print step, MiB and CPU milliseconds a step, every 50 steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw = random.Random(0)
    attention = component("attention", "mla", kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    model = plm(
        VOCABULARY,
        attention=attention,
        ffn=component("ffn", "squared_relu", hidden_dim=512),
        embed_dim=128,
        num_layers=4,
        num_heads=4,
        max_seq_len=SEQ_LEN,
    )
    loss = component("loss", "cross_entropy")()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    start = time.process_time()
    for step in range(1, steps + 1):
        rows = []
        for _ in range(ROWS):
            lengths: list[int] = []
            while (left := SEQ_LEN - sum(lengths)) > 0:
                lengths.append(min(draw.randint(20, 250), left))
            rows.append(lengths)
        segments = Segments.of(rows)
        tokens = torch.randint(VOCABULARY, (ROWS, SEQ_LEN))
        positions = torch.cat([torch.arange(length) for length in segments.lengths]).view(ROWS, SEQ_LEN)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            hidden = model(tokens, mask=segments, input_pos=positions, hidden=True).flatten(0, 1)
            counted = hidden[: draw.randint(50, len(hidden))]
            loss(counted, model.head_weight, torch.randint(VOCABULARY, (len(counted),))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(step, round(resident()), round((time.process_time() - start) / step * 1000), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="50 steps")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--precision", help="train in this process, and print")
    options = parser.parse_args()
    if options.precision:
        train(options.steps, options.precision)
        return
    steps = 50 if options.quick else options.steps
    print(machine())
    print(f"| caches | precision | MiB after 50 steps | after {steps} | CPU ms a step |\n|---|---|---|---|---|")
    for caches, precision in (("bounded", "fp32"), ("unbounded", "bf16"), ("bounded", "bf16")):
        done = subprocess.run(
            [sys.executable, __file__, "--steps", str(steps), "--precision", precision],
            env={**os.environ, **(UNBOUNDED if caches == "unbounded" else {})},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = [line.split() for line in done.stdout.splitlines()]
        print(f"| {caches} | {precision} | {lines[0][1]} | {lines[-1][1]} | {lines[-1][2]} |", flush=True)


if __name__ == "__main__":
    main()
