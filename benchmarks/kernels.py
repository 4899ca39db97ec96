"""Every kernel of quantized layers against a bf16 linear layer, by shape, format and rows, in one run.

    python benchmarks/kernels.py [--rows 1,8,64] [--shapes 2048x8192] [--formats int4_g32] [--threads 2] [--out k.json]

Shapes are [in] x [out], by default those of PLM-1.8B and of a PLM of 100M parameters. Each kernel multiplies by
matrices that take turns, --megabytes of them, so that no cache holds one; the ways are alternated. With --cpu-time the
processor time of one thread is measured in place of the clock's, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import machine

from plmtune.inference.kernel_choice import choose
from plmtune.inference.quantized_kernels import KERNELS, example, use_kernel
from plmtune.modules.quantized import ROWS, Format, Quantized

SHAPES = "2048x8192,8192x2048,2048x576,768x3072,3072x768,768x32000"
FORMATS = "int8,int4_g32,int4_g128,int8_dynamic_int8,int8_dynamic_int4_g32"


def ways(formats: list[str], out: int, width: int, num_bytes: float) -> dict[tuple[str, str], list[Quantized]]:
    """Modules by (format, kernel), as many of each as the bytes allow."""
    found = {}
    for name in formats:
        format = Format.parse(name)
        for kernel, kind in KERNELS.items():
            if kind.supports(format, torch.bfloat16, width):
                first = example(format, torch.bfloat16, (out, width))
                count = min(max(2, int(num_bytes / format.num_bytes((out, width)))), 64)
                found[name, kernel] = [use_kernel(copy.deepcopy(first), kernel) for _ in range(count)]
    return found


@torch.inference_mode()
def measure(out: int, width: int, rows: int, formats: list[str], args: argparse.Namespace) -> list[dict[str, object]]:
    clock = time.thread_time if args.cpu_time else time.perf_counter
    num_bytes = args.megabytes * 1e6
    plain = [torch.randn(out, width).to(torch.bfloat16) for _ in range(max(2, int(num_bytes / out / width / 2)))]
    x = torch.randn(rows, width).to(torch.bfloat16)
    modules = ways(formats, out, width, num_bytes)
    calls: dict[tuple[str, str], Callable[[int], object]] = {
        ("bf16", "linear"): lambda turn: F.linear(x, plain[turn % len(plain)])
    }
    for key, held in modules.items():
        calls[key] = lambda turn, held=held: held[turn % len(held)].multiply(x)  # type: ignore[misc]
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(-1, args.rounds):
        for key, call in calls.items():
            for again in range(1 if key[1] in ("wide", "reference") else 4):
                start = clock()
                call(turn * 4 + again)
                if turn >= 0:
                    taken[key].append(clock() - start)
    seconds = {key: statistics.median(times) for key, times in taken.items()}
    base = seconds["bf16", "linear"]
    return [
        {
            "in": width,
            "out": out,
            "rows": rows,
            "format": format,
            "kernel": kernel,
            "microseconds": seconds[format, kernel] * 1e6,
            "times_bf16": base / seconds[format, kernel],
            "chosen": format != "bf16"
            and choose(Format.parse(format), torch.bfloat16, x.device, (out, width))[bisect_left(ROWS, rows)] == kernel,
        }
        for format, kernel in calls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1", help="rows of the inputs, such as 1,8,64")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=200, help="of the matrices that take turns, each kernel's")
    parser.add_argument("--cpu-time", action="store_true", help="of this thread, with --threads 1")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    print("| in x out | rows | format | kernel | microseconds | of bf16's speed | |\n|---|---|---|---|---|---|---|")
    found = []
    for shape in args.shapes.split(","):
        width, out = map(int, shape.split("x"))
        for rows in map(int, args.rows.split(",")):
            for row in measure(out, width, rows, args.formats.split(","), args):
                found.append(row)
                print(
                    f"| {shape} | {rows} | {row['format']} | {row['kernel']} | {row['microseconds']:.0f} | "
                    f"{row['times_bf16']:.2f}x | {'chosen' if row['chosen'] else ''} |",
                    flush=True,
                )
    if args.out:
        text = json.dumps({"machine": machine(), "threads": args.threads, "kernels": found}, indent=2)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
