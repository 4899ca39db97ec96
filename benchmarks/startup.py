"""CPU seconds (user and system) that a command takes until it answers: medians of some processes, and the least.

Python keeps compiled files of the package, as it does where nothing forbids it; commands take turns.

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
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def cpu_seconds(arguments: list[str], directory: str) -> float:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=directory,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
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
    rows = {'python -c "import torch"': ["-c", "import torch"]}
    rows |= {f"plmtune {text}": ["-m", "plmtune", *text.split()] for text in COMMANDS}
    taken: dict[str, list[float]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(times + 1):
            for name, arguments in rows.items():
                one = cpu_seconds(arguments, directory)
                taken[name] += [one] if number else []  # the first compiles, and fills the disk's cache
    print("| command | CPU s | least |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| `{name}` | {statistics.median(seconds):.2f} | {min(seconds):.2f} |")


if __name__ == "__main__":
    main()
