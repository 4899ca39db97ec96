"""Reference solutions in the sandbox: how many pass, and seconds a program, one at a time and side by side.

python benchmarks/sandbox.py HumanEval.jsonl [--mbpp mbpp.jsonl] [--bwrap /usr/bin/bwrap] [--quick]

A solution that does not pass is named. "python" is an interpreter alone that runs the same text; "bwrap" is one that
bubblewrap starts with the same folders and namespaces, of which it also says how many processes it may start where 5
are allowed. The three take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from side_by_side import machine

from plmtune.evaluation.code_eval import CodeRunner
from plmtune.sandbox import run_python

Programs = dict[str, tuple[str, str]]
PREFIX = os.path.realpath(sys.base_prefix)
PYTHON = [f"{PREFIX}/bin/python{sys.version_info.major}.{sys.version_info.minor}", "-I", "-S", "-c"]
FORKS = """
import os, resource, time
resource.setrlimit(resource.RLIMIT_NPROC, (5, 5))
started = 0
try:
    while started < 60:
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
        started += 1
except BlockingIOError:
    pass
print(started)
"""


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
    parser.add_argument("--bwrap")
    options = parser.parse_args()
    print(machine(), flush=True)
    ways = {"python": PYTHON}
    if options.bwrap:
        ways["bwrap"] = [options.bwrap, *bubblewrap(), *PYTHON]
        print("bwrap: processes started:", subprocess.check_output([*ways["bwrap"], FORKS], text=True).strip())
    for name, programs in {
        "HumanEval": human_eval(options.human_eval),
        "MBPP": mbpp(options.mbpp) if options.mbpp else {},
    }.items():
        chosen = list(programs.items())[:: 10 if options.quick else 1]
        if chosen:
            measure(name, dict(chosen), ways)


def bubblewrap() -> list[str]:
    folders = [each for each in ("/lib", "/lib64", "/usr/lib", PREFIX) if Path(each).exists()]
    given = "--unshare-all --unshare-user --uid 65534 --gid 65534 --die-with-parent --disable-userns --new-session"
    shown = [part for folder in folders for part in ("--ro-bind", folder, folder)]
    places = "--cap-drop ALL --clearenv --dev /dev --size 16777216 --tmpfs /tmp --chdir /tmp"
    return [*given.split(), *shown, *places.split()]


def measure(name: str, programs: Programs, ways: dict[str, list[str]]) -> None:
    begun = time.perf_counter()
    results = CodeRunner(seconds=20).run(list(programs.values()))
    together = (time.perf_counter() - begun) / len(programs)
    failed = [f"{task} ({result.reason})" for task, result in zip(programs, results, strict=True) if not result.passed]
    print(f"{name}: {len(programs) - len(failed)} of {len(programs)} pass; failed: {', '.join(failed) or 'none'}")
    taken: dict[str, list[float]] = {each: [] for each in ("sandbox", *ways)}
    for code, tests in list(programs.values())[::4]:
        begun = time.perf_counter()
        run_python(code, tests=tests, seconds=20)
        taken["sandbox"].append(time.perf_counter() - begun)
        for way, command in ways.items():
            begun = time.perf_counter()
            subprocess.run([*command, f"{code}\n{tests}"], check=False, capture_output=True)
            taken[way].append(time.perf_counter() - begun)
    told = [f"{way} {1000 * statistics.median(each):.0f} ({1000 * min(each):.0f})" for way, each in taken.items()]
    print(
        f"ms a program: {1000 * together:.0f} side by side; one at a time, median (least): {', '.join(told)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
