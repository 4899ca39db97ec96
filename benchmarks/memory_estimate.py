"""The memory estimate of a run against the peak that its process reaches: sizes x recipes x precisions.

Each run has four steps of full rows, two validations and two saves, on small texts of the standard library:

    python benchmarks/memory_estimate.py [--quick] [--sizes plm_demo,plm_20m] [--recipes pretrain,sft]
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import machine

SIZES = {"plm_demo": 4, "plm_20m": 2, "plm_150m": 1}  # rows of a micro-batch
PHASES = "phases=[{{name: main, steps: 4}}]"
RECIPES = {
    "pretrain": [
        "model={size}",
        "data=files",
        "data.paths=[{data}/text.txt]",
        "tokenizer=bundled",
        "preparation.directory={data}/shards",
        "global_batch_size={rows}",
        PHASES,
    ],
    "sft": [
        "init_from={start}",
        "data=conversations",
        "data.paths=[{data}/rows.jsonl]",
        "chat.holdout=0.2",
        "global_batch_size={rows}",
        PHASES,
    ],
    "dpo": [
        "init_from={start}",
        "data=preferences",
        "data.paths=[{data}/pairs-{rows}.jsonl]",
        "chat.holdout=0.2",
        "global_batch_size={pairs}",
        "reference_cache={data}/reference",
    ],
}
COMMON = ["seq_len=256", "micro_batch_size={rows}", "validation.every=2", "checkpoint.every=2",
          "sample.max_new_tokens=0", "runtime.precision={precision}", "run_dir={run}"]  # fmt: skip
UNITS = {"MiB": 1.0, "GiB": 1024.0}


def write_data(directory: Path) -> None:
    """Text, conversations and pairs of answers, some hundred rows of each."""
    lines = [line for line in inspect.getsource(argparse).splitlines() if line.strip()]
    (directory / "text.txt").write_text("\n".join(lines))
    rows, pairs = [], []
    for i in range(0, 640, 5):
        prompt, answer, other = (" ".join(lines[j : j + 5]) for j in (i, i + 5, i + 10))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages}))
        pairs.append(json.dumps({"prompt": prompt, "chosen": answer, "rejected": other}))
    (directory / "rows.jsonl").write_text("\n".join(rows))
    for size in set(SIZES.values()):
        (directory / f"pairs-{size}.jsonl").write_text("\n".join(pairs[: 15 * size]))


def measure(name: str, arguments: list[str]) -> tuple[float, float]:
    """(estimate, peak) of one run in MiB."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "plmtune", "run", name, *arguments], stdout=said, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    found = re.search(r"^\W*total\s+([\d.,]+) (MiB|GiB)", text, re.MULTILINE)
    if process.returncode or not found:
        raise SystemExit(f"{name} {' '.join(arguments)} failed:\n{text}")
    return float(found[1].replace(",", "")) * UNITS[found[2]], usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only plm_demo in fp32")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--precisions", default="fp32,bf16")
    options = parser.parse_args()
    sizes, precisions = options.sizes.split(","), options.precisions.split(",")
    if options.quick:
        sizes, precisions = ["plm_demo"], ["fp32"]
    print(machine(), flush=True)
    print("| size | recipe | precision | estimate, MiB | peak, MiB | ratio |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        write_data(Path(directory))
        for size in sizes:
            start = Path(directory) / f"{size}-start"
            for recipe in options.recipes.split(","):
                for precision in precisions:
                    run = Path(directory) / f"{size}-{recipe}-{precision}"
                    # Pairs of 205 tokens: three fill more than a row of 512, so that every row but the last is full.
                    values = {"size": size, "start": start, "precision": precision, "run": run, "data": directory}
                    values |= {"rows": SIZES[size], "pairs": 3 * SIZES[size]}
                    estimate, peak = measure(recipe, [text.format(**values) for text in (*RECIPES[recipe], *COMMON)])
                    if recipe == "pretrain" and not start.exists():
                        run.rename(start)
                    shutil.rmtree(run, ignore_errors=True)
                    print(
                        f"| {size} | {recipe} | {precision} | {estimate:,.0f} | {peak:,.0f} | {estimate / peak:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
