"""Muon's step on a CPU: ours (fp32, matrices of a shape together) against torch.optim.Muon (bf16, one by one).

    python benchmarks/muon.py [--quick]

The matrices are plm_demo's and plm_20m's, with random gradients.
"""

from __future__ import annotations

import argparse

import torch
from side_by_side import machine, medians

from plmtune.optim.optimizers import BatchedMuon

DEMO = [(192, 128), (144, 128), (256, 128), (128, 128), (512, 128), (128, 512)] * 4
MILLIONS_20 = [(384, 256), (288, 256), (512, 256), (256, 256), (1024, 256), (256, 1024)] * 22


def step_of(kind: type[torch.optim.Muon], shapes: list[tuple[int, int]]) -> torch.optim.Muon:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return kind(parameters, lr=1e-3, adjust_lr_fn="match_rms_adamw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, to try the script")
    rounds = 1 if parser.parse_args().quick else 5
    print(machine())
    print("| matrices of | torch, ms | ours, ms | ratio |\n|---|---|---|---|")
    for name, shapes in (("plm_demo", DEMO), ("plm_20m", MILLIONS_20)):
        calls = {"torch": step_of(torch.optim.Muon, shapes).step, "ours": step_of(BatchedMuon, shapes).step}
        seconds = medians(calls, rounds=rounds)
        theirs, ours = seconds["torch"], seconds["ours"]
        print(f"| {name} | {theirs * 1e3:.1f} | {ours * 1e3:.1f} | {theirs / ours:.1f} |")


if __name__ == "__main__":
    main()
