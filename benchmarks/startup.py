"""CPU seconds (user and system) that a command takes until it answers: medians of some processes.

python benchmarks/startup.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

from side_by_side import machine

COMMANDS = (
    "--help",
    "validat",
    "run pretran",
    "run pretrain optimizer.lrr=1",
    "run pretrain model/ffn=swigluu",
    "validate demo",
    "run demo --dry-run",
)


def cpu_seconds(arguments: list[str], directory: str) -> float:
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one process each")
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    times = 1 if options.quick else options.times
    print(machine(), flush=True)
    print("| command | CPU s |\n|---|---|")
    rows = [(f"plmtune {text}", ["-m", "plmtune", *text.split()]) for text in COMMANDS]
    with tempfile.TemporaryDirectory() as directory:
        for name, arguments in [('python -c "import torch"', ["-c", "import torch"]), *rows]:
            taken = statistics.median(cpu_seconds(arguments, directory) for _ in range(times))
            print(f"| `{name}` | {taken:.2f} |", flush=True)


if __name__ == "__main__":
    main()
