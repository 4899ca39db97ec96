"""What the guard costs a training step, and what it skips in a clean run.

    python benchmarks/guards.py                 about three minutes on two cores
    python benchmarks/guards.py --quick
    python benchmarks/guards.py --steps 2000    train the demo's config that long, and count

Model, optimizer and batch are the demo's (conf/demo.yaml), fp32. Steps with and without the guard alternate, and
the median ratio of neighbours counts. A guarded step brings loss and norm to the host, judges them, and steps through
`guard.step`; an unguarded one clips as well, so the norm is there in both. "no clipping" has no norm either. On a
machine with other work these ratios are noise of some percent; "the guard alone" times its own lines inside the
guarded steps. The bars are 1% of a step, and 0.1% of 2,000 steps skipped.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plmtune.recipes import pretrain
from side_by_side import machine
from torch import nn

from plmtune.config import compose
from plmtune.io.metrics import read
from plmtune.training import guard
from plmtune.training.runtime import Runtime

SIDES = ("unguarded", "guarded", "no clipping")


def trainer(cfg: Any, runtime: Runtime) -> Callable[[str], float]:
    """Return a function that takes one optimizer step on a fixed batch, as the side of that name does.

    It gives the seconds of what only the guard does.
    """
    tokenizer = compose.build("tokenizer", cfg.tokenizer)
    model = compose.build("model", cfg.model, vocab_size=tokenizer.vocab_size)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = compose.build("optimizer", cfg.optimizer, model=model)
    scheduler = compose.build("scheduler", cfg.scheduler, optimizer=optimizer, num_steps=10**6, tokens_per_step=2048)
    loss_sum = compose.build("loss", cfg.loss)
    tokens = torch.randint(tokenizer.vocab_size, (cfg.global_batch_size, cfg.seq_len + 1))
    watchman = guard.Guard(**vars(cfg.guard))

    def step(side: str) -> float:
        own = 0.0
        hidden = model(tokens[:, :-1], hidden=True)
        loss = loss_sum(hidden.flatten(0, 1), model.head_weight, tokens[:, 1:].flatten())
        (loss / tokens[:, 1:].numel()).backward()
        if side != "no clipping":
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        if side == "guarded":
            begin = time.perf_counter()
            (total,) = runtime.sum(loss)
            accepted = watchman.accepts(total / tokens[:, 1:].numel(), float(norm))
            own = time.perf_counter() - begin
        else:
            accepted = True
        if accepted:
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return own

    return step


def compare(cfg: Any, runtime: Runtime, rounds: int) -> None:
    step = trainer(cfg, runtime)
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    own: list[float] = []
    for number in range(rounds + 2):  # two to warm up
        for side in SIDES[:: 1 if number % 2 == 0 else -1]:
            begin = time.perf_counter()
            seconds = step(side)
            taken[side].append(time.perf_counter() - begin)
            own += [seconds] if side == "guarded" else []
    base = taken["unguarded"][2:]
    print(f"{cfg.global_batch_size} sequences of {cfg.seq_len} tokens a step; {rounds} steps a side\n")
    print("| step | ms | ratio | middle half of the ratios |\n|---|---|---|---|")
    for side in SIDES:
        times = taken[side][2:]
        low, middle, high = statistics.quantiles([own / other for own, other in zip(times, base, strict=True)], n=4)
        print(f"| {side} | {statistics.median(times) * 1e3:.1f} | {middle:.4f} | {low:.3f} to {high:.3f} |")
    alone, usual = statistics.median(own[2:]), statistics.median(base)
    print(f"\nthe guard alone: {alone * 1e6:.0f} microseconds, {alone / usual:.3%} of a step")
    print(f"of that Guard.accepts: {accepts_seconds() * 1e6:.1f} microseconds with a full window")


def accepts_seconds(calls: int = 20_000) -> float:
    """Seconds of one call with a full window."""
    draw, watchman = random.Random(0), guard.Guard()
    norms = [draw.lognormvariate(0, 0.3) for _ in range(calls)]
    for norm in norms[:1000]:
        watchman.accepts(1.0, norm)
    begin = time.perf_counter()
    for norm in norms:
        watchman.accepts(1.0, norm)
    return (time.perf_counter() - begin) / calls


def clean_run(overrides: list[str], steps: int) -> None:
    """Train by the recipe, and print what its guard skipped and how near the others came."""
    with tempfile.TemporaryDirectory() as directory:
        phases = f"phases=[{{name: main, steps: {steps}}}]"
        quiet = ["logger=jsonl", "sample.max_new_tokens=0", "validation.every=0", "checkpoint.every=0"]
        settings = [f"run_dir={directory}/run", phases, "log_every=1", "runtime.device=cpu", *quiet]
        cfg = compose.compose("demo", (), [*settings, *overrides])
        pretrain.main(cfg)
        entries = [entry for entry in read(Path(directory) / "run/metrics.jsonl") if "loss" in entry]
    history: deque[float] = deque(maxlen=cfg.guard.window)
    ratios: dict[int, float] = {}
    for entry in entries:
        norm = entry["grad_norm"]
        if len(history) >= max(cfg.guard.window // 4, 1):
            ratios[entry["step"]] = norm / statistics.median(history)
        if "skipped" not in entry:
            history.append(norm)
    skipped = sum("skipped" in entry for entry in entries)
    worst = max(ratios, key=lambda step: ratios[step])
    print(f"\n{len(entries):,} steps, {skipped} skipped ({skipped / len(entries):.2%}; the bar is 0.10%)")
    print(f"largest norm: {ratios[worst]:.1f} times the median of its window, at step {worst:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten steps a side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="train the demo this long instead, and count")
    parser.add_argument("overrides", nargs="*", help="of the demo's config, as for plmtune run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    if options.steps:
        clean_run(options.overrides, options.steps)
        return
    with Runtime.choose(device="cpu", precision="fp32").start() as runtime:
        compare(compose.compose("demo", (), options.overrides), runtime, 10 if options.quick else 100)


if __name__ == "__main__":
    main()
