"""Distillation at a 152k vocabulary against full logits, and a step with a teacher against its parts.

    python benchmarks/distillation.py            2,048 tokens; widths 512 and 1,024; forward and backward
    python benchmarks/distillation.py --quick    half the tokens, one round
    python benchmarks/distillation.py --threads 1    CPU seconds, which other programs do not disturb

Each side runs in its own process, as peak memory only grows; the order alternates from round to round. Peak is the
process's highest resident memory above what it held with its inputs made, gradients included. The parts are the
student's forward and backward with cross entropy, and of the teacher either a forward with its logits, in chunks, or
(teacher_step) a forward and backward with cross entropy, as the student's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import plmtune
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.losses.distillation import ForwardKL, TeacherStates, TeacherTopK
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.training.runtime import peak_memory_bytes
from plmtune.training.teacher_cache import most_likely

VOCAB = 151936
CPU = torch.device("cpu")
LOSSES, STEPS = ("chunked", "full", "top_k"), ("student", "teacher", "teacher_step", "distilled")


def full(hidden: Tensor, weight: Tensor, targets: Tensor, teacher: TeacherStates) -> Tensor:
    """The formula with both models' logits in memory."""
    log_p = F.log_softmax(F.linear(teacher.hidden, teacher.weight).float(), dim=1)
    log_q = F.log_softmax(F.linear(hidden, weight).float(), dim=1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def loss_side(side: str, tokens: int) -> Callable[[], float]:
    hidden = torch.randn(tokens, 512, requires_grad=True)
    weight = torch.empty(VOCAB, 512).normal_(0, 0.02).requires_grad_()
    states = TeacherStates(torch.randn(tokens, 1024), torch.empty(VOCAB, 1024).normal_(0, 0.02))
    targets = torch.randint(VOCAB, (tokens,))
    loss = ForwardKL()
    teacher: TeacherStates | TeacherTopK = states
    if side == "top_k":
        chunks = [most_likely(h @ states.weight.T, 64) for h in states.hidden.split(256)]
        ids, log_probs, log_rest = (
            torch.cat(t) for t in zip(*((c.ids, c.log_probs, c.log_rest) for c in chunks), strict=True)
        )
        teacher = TeacherTopK(ids, log_probs, log_rest)

    def run() -> float:
        value = (
            full(hidden, weight, targets, states) if side == "full" else loss(hidden, weight, targets, teacher=teacher)
        )
        value.backward()
        hidden.grad = weight.grad = None
        return value.item()

    return run


def model(width: int, layers: int) -> Decoder:
    attention = plmtune.component("attention", "gqa", num_kv_heads=width // 256)
    ffn = plmtune.component("ffn", "swiglu", hidden_dim=3 * width)
    sizes: dict[str, Any] = {"embed_dim": width, "num_layers": layers, "num_heads": width // 64, "max_seq_len": 1024}
    made: Decoder = llama(VOCAB, attention=attention, ffn=ffn, tie_embeddings=True, **sizes)
    return made


def step_side(side: str, tokens: int) -> Callable[[], float]:
    ids = torch.randint(VOCAB, (4, tokens // 4))
    targets = torch.randint(VOCAB, (tokens,))
    student = model(512, 8) if side in ("student", "distilled") else model(1024, 16) if side == "teacher_step" else None
    teacher = model(1024, 16).eval().requires_grad_(False) if side in ("teacher", "distilled") else None
    distilled, plain = ForwardKL(cross_entropy_weight=0.5), cross_entropy()

    def run() -> float:
        states = None
        if teacher:
            with torch.no_grad():
                states = TeacherStates(teacher(ids, hidden=True).flatten(0, 1), teacher.head_weight)
        if not student:
            assert states
            return sum(float((h @ states.weight.T)[0, 0]) for h in states.hidden.split(256))
        hidden = student(ids, hidden=True).flatten(0, 1)
        head = student.head_weight
        loss = distilled(hidden, head, targets, teacher=states) if states else plain(hidden, head, targets)
        loss.backward()
        student.zero_grad(set_to_none=True)
        return loss.item()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Distillation against full logits, and against its parts.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", choices=(*LOSSES, *STEPS), help="internal: run one side in this process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=("losses", "steps"), help="default: both")
    options = parser.parse_args()
    tokens, rounds = (1024, 1) if options.quick else (2048, 3)
    torch.set_num_threads(options.threads)
    if options.side:
        torch.manual_seed(0)
        run = loss_side(options.side, tokens) if options.side in LOSSES else step_side(options.side, tokens)
        clock = time.process_time if options.threads == 1 else time.perf_counter
        baseline, times = peak_memory_bytes(CPU), []
        for _ in range(3):
            start = clock()
            run()
            times.append(clock() - start)
        print(json.dumps({"seconds": times[1:], "peak": peak_memory_bytes(CPU) - baseline}))
        return
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{tokens} tokens, vocabulary {VOCAB}, fp32")
    for sides in (LOSSES, STEPS):
        if options.part == ("steps" if sides is LOSSES else "losses"):
            continue
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        peaks: dict[str, list[int]] = {side: [] for side in sides}
        for index in range(rounds):
            for side in sides if index % 2 == 0 else reversed(sides):
                command = [sys.executable, __file__, "--side", side, "--threads", str(options.threads)]
                command += ["--quick"] if options.quick else []
                result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                seconds[side] += result["seconds"]
                peaks[side].append(result["peak"])
        print("| side | seconds | peak MiB |\n|---|---|---|")
        for side in sides:
            print(f"| {side} | {statistics.median(seconds[side]):.2f} | {statistics.median(peaks[side]) / 2**20:.0f} |")
        time_of = {side: statistics.median(seconds[side]) for side in sides}
        if sides is LOSSES:
            for side in ("chunked", "top_k"):
                peak = statistics.median(peaks[side]) / statistics.median(peaks["full"])
                print(f"{side} / full: time {time_of[side] / time_of['full']:.2f}, peak {peak:.2f}")
        else:
            for other in ("teacher", "teacher_step"):
                ratio = time_of["distilled"] / (time_of["student"] + time_of[other])
                print(f"distilled / (student + {other}): {ratio:.2f}")


if __name__ == "__main__":
    main()
