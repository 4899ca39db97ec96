"""Losses, gradient norms and gradients of every layout of many processes against those of one, by kind of model.

python benchmarks/parallel.py [--processes 2 4 8]

Models of four layers, three steps in fp32 on a CPU; tests/parallel/kinds.py has the kinds and the layouts. It prints
the table of docs/distributed.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import machine

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "parallel")]

from group import in_group  # noqa: E402
from kinds import KINDS, LAYOUTS, STEPS, differences, learn, matrix, start  # noqa: E402


def rows(ranks: list[dict[str, Any]], one: dict[str, Any]) -> list[str]:
    """A line for each layout: the largest difference of each kind's losses, and of all kinds' norms and gradients."""
    lines = []
    for layout in LAYOUTS:
        of_kinds, exact = {}, True
        for kind in KINDS:
            case = f"{layout} / {kind}"
            if case in ranks[0]:
                of_kinds[kind] = differences([rank[case] for rank in ranks], one[kind])
                exact &= all(len(set(rank[case]["held"])) == 1 for rank in ranks)
        if of_kinds:
            losses = [f"{of_kinds[kind]['losses']:.0e}" if kind in of_kinds else "-" for kind in KINDS]
            worst = [f"{max(of_kind[what] for of_kind in of_kinds.values()):.0e}" for what in ("norms", "gradients")]
            held = "as predicted" if exact else "DIFFERENT"
            lines.append(f"| {' | '.join([layout, str(len(ranks)), *losses, *worst, held])} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", nargs="*", type=int, default=[2, 4, 8])
    chosen = parser.parse_args()
    print(f"{STEPS} steps in fp32, on {machine()}; relative differences from one process\n", flush=True)
    one = {kind: learn(kind, start(None)) for kind in KINDS}
    header = ["layout", "processes", *(f"losses, {kind}" for kind in KINDS), "norms", "gradients", "numbers held"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for processes in chosen.processes:
        with tempfile.TemporaryDirectory() as directory:
            print("\n".join(rows(in_group(matrix, processes, Path(directory)), one)), flush=True)


if __name__ == "__main__":
    main()
