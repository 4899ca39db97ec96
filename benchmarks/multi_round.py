"""Two rounds against one at equal steps: the second draws by loss, at random, or is replaced by new text.

    OMP_NUM_THREADS=1 python benchmarks/multi_round.py            the table of docs/data.md, 10 CPU minutes
    OMP_NUM_THREADS=1 python benchmarks/multi_round.py --quick    one seed and a sixth of the steps
    python benchmarks/multi_round.py --set model=plm_demo data=files 'data.paths=[my_text/]'

Every run has the same model, seed, schedule and number of steps. With two rounds the first has two thirds of the steps,
and the second draws half of its sequences again; with one round all sequences are new. The held-out loss is that of
the last step, over the same held-out text.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from side_by_side import machine

from plmtune.cli import cli
from plmtune.io.metrics import read

SMALL = [
    "model=plm_tiny", "tokenizer=byte", "data=stdlib", "optimizer=adamw", "optimizer.lr=2e-3", "scheduler=wsdc",
    "seq_len=256", "global_batch_size=8", "micro_batch_size=8", "runtime.precision=fp32", "logger=jsonl",
    "log_every=50", "validation={every: 0, tokens: 100000}", "checkpoint={every: 0, keep: 1}",
    "sample.max_new_tokens=0",
]  # fmt: skip
TWO = "multi_round={{rounds: 2, keep: 0.5, draw: {draw}, temperature: {temperature}}}"
ARMS = {
    "one round, all text new": None,
    "two, uniform draw": TWO.format(draw="uniform", temperature=1),
    "two, by loss, temperature 1": TWO.format(draw="loss", temperature=1),
    "two, by loss, temperature 0.3": TWO.format(draw="loss", temperature=0.3),
}


def held_out(run: Path, overrides: list[str]) -> tuple[float, float]:
    """Nats a token and bits a byte of a run's last validation."""
    shutil.rmtree(run, ignore_errors=True)
    with contextlib.redirect_stdout(sys.stderr):
        cli.main(["run", "pretrain", f"run_dir={run}", *overrides], standalone_mode=False)
    last = [entry for entry in read(run / "metrics.jsonl") if "validation_loss" in entry][-1]
    return float(last["validation_loss"]), float(last["bits_per_byte"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/multi_round"))
    parser.add_argument("--steps", type=int, default=360, help="of each run, over all its rounds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every run")
    options = parser.parse_args()
    steps, seeds = (60, 1) if options.quick else (options.steps, options.seeds)
    common = [*SMALL, f"preparation.directory={options.work}/data", *options.set]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    began = time.perf_counter()
    for seed in range(1, seeds + 1):
        for number, (name, rounds) in enumerate(ARMS.items()):
            first = steps if rounds is None else steps * 2 // 3
            own = [f"phases=[{{name: main, steps: {first}}}]", f"seed={seed}", *([rounds] if rounds else [])]
            found[name].append(held_out(options.work / f"{number}-{seed}", [*common, *own]))
            print(f"seed {seed}: {name}: {found[name][-1][0]:.4f}", file=sys.stderr, flush=True)
    print(f"{machine()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, {time.perf_counter() - began:.0f} s")
    print(f"{steps} steps, seeds 1 to {seeds}\n")
    print("| run | held-out loss | spread | bits a byte | less than uniform, by seed |\n|---|---|---|---|---|")
    control = [loss for loss, _ in found["two, uniform draw"]]
    for name, measured in found.items():
        losses = [loss for loss, _ in measured]
        gains = ", ".join(f"{base - loss:+.4f}" for base, loss in zip(control, losses, strict=True))
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else "-"
        print(f"| {name} | {mean(losses):.4f} | {spread} | {mean(bits for _, bits in measured):.4f} | {gains} |")


if __name__ == "__main__":
    main()
