"""The ladder from bf16 to 4 bits: size, perplexity and tokens/s of one model in every scheme and GGUF type.

Every rung is made by plmtune's own commands and read by the program that serves it: ours for checkpoints, llama.cpp for
GGUF. Perplexity is of the same windows of the same text for all, each token given those before it in its window.

    plmtune convert FILE.gguf smollm2
    python benchmarks/ladder.py smollm2 --text ../shared/data/pretrain/wikitext2_valid.txt
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from side_by_side import machine

from plmtune.export.runtimes import RuntimeName, open_runtime
from plmtune.tokenizers.tokenizer_files import load_tokenizer

SCHEMES = {
    "int8": ["quantization=int8"],
    "int8_dynamic": ["quantization=int8_dynamic"],
    "int8_dynamic_int4": ["quantization=int8_dynamic_int4"],
    "int4": ["quantization=int4"],
    "int4, groups of 128": ["quantization=int4", "quantization.group_size=128"],
    "int4, uncalibrated": ["quantization=int4", "calibration_tokens=0"],
}
GGUF = "f32,f16,bf16,q8_0,q6_k,q5_k_m,q4_k_m,q4_0,q3_k_m,q2_k"


def make(checkpoint: Path, work: Path, types: str, data: list[str]) -> dict[str, Path]:
    """Make what is not there yet; returns the path of each rung."""
    rungs = {"bf16": work / "bf16"}
    if not rungs["bf16"].exists():
        command("export", checkpoint, "--to", "hf", "--quant", "bf16", "--out", work, "--name", "bf16", "--no-verify")
        next(work.glob("bf16-hf*")).rename(rungs["bf16"])
    for name, overrides in SCHEMES.items():
        rungs[name] = work / name.replace(", ", "-").replace(" ", "-")
        if not rungs[name].exists():
            command(
                "run",
                "quantize",
                f"checkpoint={checkpoint}",
                f"run_dir={rungs[name]}",
                "test_tokens=0",
                *overrides,
                *data,
            )
    for kind in types.split(","):
        rungs[f"GGUF {kind.upper()}"] = path = work / f"ladder-{kind.upper()}.gguf"
        if not path.exists():
            command(
                "export", checkpoint, "--to", "gguf", "--quant", kind, "--out", work, "--name", "ladder", "--no-verify"
            )
    return rungs


def command(*words: object) -> None:
    print("plmtune", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "plmtune", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def perplexity(path: Path, windows: list[list[int]], threads: int) -> float:
    """exp of the mean -log p of every token but each window's first."""
    with open_runtime(path, threads=threads, context=len(windows[0]), prefer=serving(path)) as runtime:
        nats = 0.0
        for ids in windows:
            found = runtime.log_probs(ids[:-1], len(ids) - 1)
            nats -= float(found.gather(1, torch.tensor(ids[1:])[:, None]).double().sum())
    return math.exp(nats / sum(len(ids) - 1 for ids in windows))


def measured(name: str, path: Path, windows: list[list[int]], arguments: argparse.Namespace) -> dict[str, float]:
    """Size and perplexity of a rung: kept beside the rungs, since they do not depend on how busy a machine is."""
    kept = arguments.work / "perplexities.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    written = max(file.stat().st_mtime_ns for file in files(path))
    key = (
        f"{name}, {size(path)} bytes of {written}, {len(windows)} windows of {len(windows[0])} of {arguments.text.name}"
    )
    if key not in known:
        known[key] = perplexity(path, windows, arguments.threads)
        kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: perplexity {known[key]:.3f}", file=sys.stderr, flush=True)
    return {"bytes": size(path), "perplexity": known[key]}


def speed(path: Path, prompt: list[int], new_tokens: int, threads: int) -> float:
    """Tokens a second of decoding after `prompt`: the median step."""
    with open_runtime(path, threads=threads, context=len(prompt) + new_tokens + 1, prefer=serving(path)) as runtime:
        token, times = runtime.start(prompt), []
        for _ in range(new_tokens):
            begun = time.perf_counter()
            token = runtime.step(token)
            times.append(time.perf_counter() - begun)
    return 1 / median(times)


def serving(path: Path) -> RuntimeName | None:
    """Ours for every directory: transformers could read the one of bf16, too."""
    return "plmtune" if path.is_dir() else None


def files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in files(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/ladder"), help="where the rungs are made, and kept")
    parser.add_argument("--gguf", default=GGUF, help="types")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--calibrate-on", nargs="*", default=[], help="files of text in place of the standard library")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-speed", action="store_true", help="perplexities alone; they are kept for the next time")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.checkpoint)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))
    step = arguments.window
    windows = [ids[i * step : (i + 1) * step] for i in range(min(arguments.windows, len(ids) // step))]
    data = [f"data=files data.paths=[{','.join(arguments.calibrate_on)}]"] if arguments.calibrate_on else []
    rungs = make(arguments.checkpoint, arguments.work, arguments.gguf, " ".join(data).split())
    rows = {name: measured(name, path, windows, arguments) for name, path in rungs.items()}
    if arguments.no_speed:
        return
    times: dict[str, list[float]] = {name: [] for name in rungs}
    for number in range(arguments.rounds):  # in turns and back, so that no rung has the quiet hour
        for name in list(rungs)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(speed(rungs[name], windows[0][:128], arguments.new_tokens, arguments.threads))
    for name, row in rows.items():
        row["tokens_per_second"] = median(times[name])
    on = machine()
    print(f"{on}; {len(windows)} windows of {step} tokens of {arguments.text.name}")
    print(f"{'':24}{'MB':>8}{'perplexity':>12}{'tokens/s':>10}{'x bf16':>8}")
    base = rows["bf16"]["tokens_per_second"]
    for name, row in rows.items():
        rate = row["tokens_per_second"]
        print(f"{name:24}{row['bytes'] / 1e6:8.1f}{row['perplexity']:12.3f}{rate:10.1f}{rate / base:8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": on, "rungs": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
