"""Reference solutions in the sandbox: how many pass, and seconds a program, one at a time and side by side.

python benchmarks/sandbox.py HumanEval.jsonl [--mbpp mbpp.jsonl] [--quick]

A solution that does not pass is named. `python` is an interpreter alone that runs the same text, with no sandbox.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from side_by_side import machine

from plmtune.evaluation.code_eval import CodeRunner
from plmtune.sandbox import run_python

Programs = dict[str, tuple[str, str]]


def human_eval(path: Path) -> Programs:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {
        row["task_id"]: (row["prompt"] + row["canonical_solution"], f"{row['test']}\ncheck({row['entry_point']})")
        for row in rows
    }


def mbpp(path: Path) -> Programs:
    """Read MBPP, a JSON line a row, or its sanitized form, one JSON list."""
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    return {
        f"MBPP/{row['task_id']}": (
            row["code"],
            "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or "", *row["test_list"]]),
        )
        for row in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("human_eval", type=Path)
    parser.add_argument("--mbpp", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tenth of the programs")
    options = parser.parse_args()
    print(machine(), flush=True)
    for name, programs in {
        "HumanEval": human_eval(options.human_eval),
        "MBPP": mbpp(options.mbpp) if options.mbpp else {},
    }.items():
        chosen = list(programs.items())[:: 10 if options.quick else 1]
        if chosen:
            measure(name, dict(chosen))


def measure(name: str, programs: Programs) -> None:
    begun = time.perf_counter()
    results = CodeRunner(seconds=20).run(list(programs.values()))
    together = (time.perf_counter() - begun) / len(programs)
    failed = [f"{task} ({result.reason})" for task, result in zip(programs, results, strict=True) if not result.passed]
    print(f"{name}: {len(programs) - len(failed)} of {len(programs)} pass; failed: {', '.join(failed) or 'none'}")
    alone, plain = [], []
    for code, tests in list(programs.values())[::4]:
        begun = time.perf_counter()
        run_python(code, tests=tests, seconds=20)
        alone.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", f"{code}\n{tests}"], check=False, capture_output=True)
        plain.append(time.perf_counter() - begun)
    print(
        f"ms a program: {1000 * together:.0f} side by side, median {1000 * statistics.median(alone):.0f} one at a "
        f"time, python alone {1000 * statistics.median(plain):.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
