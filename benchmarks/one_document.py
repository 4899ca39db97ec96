"""Memory and time of `plmtune data prepare` on a text file that is one document.

python benchmarks/one_document.py [--megabytes 1000] [--text FILE ...] [--tokenizer bundled] [--holdout-by documents]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import psutil
from side_by_side import machine

# Where no text is named: lines of several scripts, a quarter of whose characters have more than one byte.
LINES = "".join(
    f"Line {number}: the quick brown fox, der Fuchs hört ihn, 敏捷的棕色狐狸, быстрая лиса; {number * number} = n².\n"
    for number in range(20_000)
)


def write(path: Path, texts: list[bytes], num_bytes: int) -> None:
    """Repeat the texts up to a size."""
    with path.open("wb") as file:
        for text in cycle(texts):
            if file.tell() >= num_bytes:
                return
            file.write(text)


def memory(process: psutil.Process) -> tuple[int, int]:
    """Bytes in memory of a process and all that it started: (resident, with shared pages divided among the sharing)."""
    resident = shared = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            held = one.memory_full_info()
        except psutil.Error:
            continue
        resident, shared = resident + held.rss, shared + held.pss
    return resident, shared


def main() -> None:
    """Make the file, prepare it, and print what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--tokenizer", default="bundled")
    parser.add_argument("--holdout-by", default="documents")
    chosen = parser.parse_args()
    texts = [path.read_bytes() for path in chosen.text] or [LINES.encode()]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "one.txt"
        write(path, texts, chosen.megabytes * 10**6)
        print(f"{path.stat().st_size / 1e6:,.0f} MB in one document, on {machine()}", flush=True)
        options = ["--tokenizer", chosen.tokenizer, "--holdout-by", chosen.holdout_by, "--out", f"{place}/out"]
        command = [sys.executable, "-m", "plmtune", "data", "prepare", str(path), *options]
        begun = time.monotonic()
        peak = (0, 0)
        running = subprocess.Popen(command)
        process = psutil.Process(running.pid)
        while running.poll() is None:
            now = memory(process)
            peak = max(peak[0], now[0]), max(peak[1], now[1])
            time.sleep(0.05)
        seconds = time.monotonic() - begun
    print(f"exit code {running.returncode}, {seconds:.0f} s")
    print(f"peak: {peak[0] / 2**20:,.0f} MiB resident, {peak[1] / 2**20:,.0f} MiB with shared pages divided (PSS)")


if __name__ == "__main__":
    main()
