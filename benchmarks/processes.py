"""Losses of two processes against those of one, by optimizer and strategy: the demo's model in fp32 on a CPU.

python benchmarks/processes.py [--steps 39] [--optimizers adamw muon_demo]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import machine

from plmtune.io import metrics


def losses(place: Path, name: str, processes: int, *overrides: str) -> list[float]:
    """Train, and return the loss of each step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(launcher if processes > 1 else []), "-m", "plmtune", "run", "demo"]
    subprocess.run(
        [*start, f"run_dir={place / name}", "log_every=1", "sample.max_new_tokens=0", "checkpoint.every=0", *overrides],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return [entry["loss"] for entry in metrics.read(place / name / "metrics.jsonl") if "loss" in entry]


def main() -> None:
    """Print the largest difference of each pair."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=39)
    parser.add_argument("--optimizers", nargs="*", default=["adamw", "muon_demo"])
    chosen = parser.parse_args()
    print(f"the demo's model, {chosen.steps} steps in fp32, on {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for optimizer in chosen.optimizers:
            phases = f"phases=[{{name: main, steps: {chosen.steps}}}]"
            same = [phases, f"optimizer={optimizer}", "runtime.precision=fp32", f"preparation.directory={name}/data"]
            alone = losses(Path(name), f"{optimizer}-one", 1, *same)
            for strategy in ("ddp", "fsdp"):
                two = losses(Path(name), f"{optimizer}-{strategy}", 2, *same, f"runtime.strategy={strategy}")
                most = max(abs(a - b) for a, b in zip(alone, two, strict=True))
                print(
                    f"{optimizer} {strategy}: losses differ by at most {most:.1e} over {len(alone)} steps", flush=True
                )


if __name__ == "__main__":
    main()
