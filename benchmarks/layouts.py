"""Measured steps of all layouts of some gloo processes beside their predictions (plmtune plan --cluster).

    python benchmarks/layouts.py --processes 8

One set of processes trains a small model under one layout after the other, in two rounds of opposite order. The table
has the fastest step of each round's median, the prediction for plmtune/clusters/gloo.yaml, and the ranks of both. The
last lines say how much slower than the best measured layout the planner's first one is, and Spearman's correlation.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scipy.stats import spearmanr
from side_by_side import machine
from torch.multiprocessing import start_processes

from plmtune.clusters.cluster import load_cluster
from plmtune.clusters.job import Job
from plmtune.clusters.layouts import search
from plmtune.data.batches import Batch
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.parallel.layout import Layout
from plmtune.parallel.mesh import arrange
from plmtune.registry import component
from plmtune.training import distributed
from plmtune.training.runtime import Runtime

ROWS, VOCABULARY = 16, 4096


def build(seq_len: int) -> Decoder:
    """MLA and squared ReLU, 8 heads and 8 layers, so that all sizes up to 8 divide them; on the meta device."""
    mla = component("attention", "mla", kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    ffn = component("ffn", "squared_relu", hidden_dim=1024)
    with torch.device("meta"):
        return plm(VOCABULARY, embed_dim=256, num_layers=8, num_heads=8, max_seq_len=seq_len, attention=mla, ffn=ffn)


def step_seconds(layout: Layout, rank: int, seq_len: int, seconds: float) -> float:
    """The median step of one layout, of as many as fit into `seconds` but two at least, after one that warms up."""
    runtime = Runtime(torch.device("cpu"), torch.float32, layout, rank, timedelta(minutes=5))
    runtime.processes = arrange(layout, runtime.device, runtime.timeout)
    model = runtime.allocate(build(seq_len))
    model.init_weights(torch.Generator().manual_seed(1))
    trained: Any = runtime.distribute(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss = cross_entropy()
    ids = torch.randint(VOCABULARY, (ROWS, seq_len + 1), generator=torch.Generator().manual_seed(2))
    rows = ids.chunk(runtime.data_world_size)[runtime.data_rank]
    batches = [Batch(row[None, :-1], row[None, 1:], None, None, seq_len) for row in rows]
    batches = [batch.part(runtime.context) for batch in batches] if runtime.context else batches
    scale = runtime.gradient_scale / (ROWS * seq_len)

    def loss_of(batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        states, targets = batch.counted(hidden)
        found: torch.Tensor = loss(states, model.head_weight, targets)
        return found

    def step() -> None:
        if layout.pp > 1:
            trained.backward(batches, loss_of, scale)
        else:
            for number, batch in enumerate(batches):
                with runtime.accumulate(trained, first=number == 0, last=number == len(batches) - 1):
                    hidden = trained(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)
                    (loss_of(batch, hidden) * scale).backward()
        runtime.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    times: list[float] = []
    while len(times) < 2 or not distributed.any_rank(sum(times) > seconds):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def work(rank: int, port: int, layouts: list[Layout], options: argparse.Namespace, directory: str) -> None:
    """One process: all layouts forward, then backward."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": options.processes, "LOCAL_WORLD_SIZE": options.processes}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.start_process_group(torch.device("cpu"), timedelta(minutes=5))
    found: dict[int, list[float]] = {}
    for order in (1, -1):
        for number in list(range(len(layouts)))[::order]:
            taken = step_seconds(layouts[number], rank, options.seq_len, options.seconds)
            found.setdefault(number, []).append(taken)
            if rank == 0:
                print(f"{layouts[number]!s:<45} {taken:.3f} s", flush=True)
    if rank == 0:
        Path(directory, "found.json").write_text(json.dumps([found[number] for number in range(len(layouts))]))
    dist.barrier()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a layout's steps in one round")
    options = parser.parse_args()
    cluster = replace(load_cluster("gloo"), devices_per_node=options.processes)
    job = Job(build(options.seq_len), options.seq_len, ROWS, torch.float32)
    predicted = search(job, cluster, micro_batch_sizes=[1], checkpointings=["none"]).fitting
    predicted = [each for each in predicted if each.plan.layout.reshard_after_forward]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        layouts = [each.plan.layout for each in predicted]
        start_processes(work, (port, layouts, options, directory), nprocs=options.processes, start_method="forkserver")
        rounds = json.loads(Path(directory, "found.json").read_text())
    measured = [min(times) for times in rounds]
    places = {number: place for place, number in enumerate(sorted(range(len(measured)), key=measured.__getitem__), 1)}
    print(f"\n{machine()}; {options.processes} processes of one thread, {ROWS} rows of {options.seq_len} tokens")
    print(
        "| predicted rank | layout | predicted, s | measured, s (both rounds) | measured rank |\n|---|---|---|---|---|"
    )
    for number, each in enumerate(predicted):
        both = " ".join(f"{seconds:.3f}" for seconds in rounds[number])
        print(f"| {number + 1} | {each.plan.layout} | {each.seconds:.3f} | {both} | {places[number]} |")
    print(f"\nthe planner's first layout: {measured[0] / min(measured) - 1:+.1%} of the best measured step")
    print(f"Spearman: {spearmanr([each.seconds for each in predicted], measured).statistic:.3f}")
    spread = statistics.median(abs(a - b) / min(a, b) for a, b in rounds)
    print(f"median difference of the two rounds: {spread:.1%}")


if __name__ == "__main__":
    main()
