"""PLM-1.8B on one GPU: throughput and MFU, chunk rows of the loss, attention kernels, in one table.

    python benchmarks/gpu.py --out gpu.json          under ten minutes on a large GPU
    python benchmarks/gpu.py --toy                   the same at toy size on a CPU, in seconds

Weights and AdamW's moments are fp32, arithmetic is bf16 by autocast. Times are medians after a warm-up. Three
conventions of MFU are given: 6N (parameters alone), causal (attention counted where it is not masked), and
PaLM's (attention in full; the convention of plmtune's progress line). A part that fails prints its error and
the next goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))  # also runs from a checkout that is not installed

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.plm import plm
from plmtune.optim.optimizers import adamw
from plmtune.registry import component
from plmtune.training.estimate import attention_flops
from plmtune.training.machine import peak_flops

# torch 2.13 has it; our loss needs it in fp32, as the toy runs, and not in bf16.
NATIVE_LOSS = hasattr(torch.nn, "LinearCrossEntropyOptions")


@dataclass
class Bench:
    """Sizes and results of one run of this script."""

    device: torch.device
    toy: bool
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.toy else torch.bfloat16

    @property
    def seq_len(self) -> int:
        return 64 if self.toy else 4096

    @property
    def vocab_size(self) -> int:
        return 512 if self.toy else 151936

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.toy else torch.autocast("cuda", torch.bfloat16)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0

    def milliseconds(self, work: Callable[[], object], repeats: int = 5, warmup: int = 3) -> float:
        """Median time of `work`, by the device's own events where it has them."""
        for _ in range(warmup):
            work()
        self.sync()
        times = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                work()
                times.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(times)


def say(text: str) -> None:
    print(text, flush=True)


def build_model(bench: Bench) -> Any:
    if bench.toy:
        attention = component(
            "attention", "mla", kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
        )
        ffn = component("ffn", "squared_relu", hidden_dim=64)
        sizes: dict[str, Any] = {
            "embed_dim": 32,
            "num_layers": 2,
            "num_heads": 2,
            "max_seq_len": bench.seq_len,
        }
        return plm(bench.vocab_size, attention=attention, ffn=ffn, **sizes)
    with torch.device(bench.device):
        return plm(bench.vocab_size)


def machine(bench: Bench) -> dict[str, Any]:
    cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "native_linear_cross_entropy": NATIVE_LOSS,
        "peak_flops": peak_flops(bench.device, bench.dtype),
    }


def attention(bench: Bench) -> list[dict[str, Any]]:
    """Forward and backward time of each kernel for heads of 192 and 128."""
    b, h, s, qk, v = (1, 2, 64, 24, 16) if bench.toy else (2, 16, 4096, 192, 128)
    kernels = {
        "cudnn": (SDPBackend.CUDNN_ATTENTION, False),
        "flash, values padded": (SDPBackend.FLASH_ATTENTION, True),
        "efficient": (SDPBackend.EFFICIENT_ATTENTION, False),
        "math": (SDPBackend.MATH, False),
    }
    flops = 3 * b * h * s * s * (qk + v)  # causal: half of 2 s^2 (qk + v) forward, twice that backward
    rows: list[dict[str, Any]] = []
    for name, (backend, padded) in kernels.items():
        bench.free()
        shape = (b, h, s)
        q, k, w = (torch.randn(*shape, n, device=bench.device, dtype=bench.dtype) for n in (qk, qk, v))
        leaves = [t.requires_grad_() for t in (q, k, w)]

        def forward(leaves: list[Tensor] = leaves, padded: bool = padded) -> Tensor:
            q, k, w = leaves
            w = F.pad(w, (0, qk - v)) if padded else w
            return F.scaled_dot_product_attention(q, k, w, is_causal=True)[..., :v]

        def both(leaves: list[Tensor] = leaves, forward: Callable[[], Tensor] = forward) -> None:
            torch.autograd.grad(forward().sum(), leaves)

        row: dict[str, Any] = {"kernel": name}
        try:
            with sdpa_kernel(backend):
                row |= {
                    "forward_ms": bench.milliseconds(forward),
                    "forward_backward_ms": bench.milliseconds(both),
                }
            row["tflops"] = flops / row["forward_backward_ms"] / 1e9
            say(f"  {name:<22} forward {row['forward_ms']:.2f} ms, both {row['forward_backward_ms']:.2f} ms, "
                f"{row['tflops']:.0f} TFLOP/s")  # fmt: skip
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["error"] = str(error).splitlines()[0]
            say(f"  {name:<22} does not run: {row['error']}")
        rows.append(row)
    from plmtune.modules.attention_kernels import choose_kernel

    say(f"  plmtune chooses: {choose_kernel(bench.device, bench.dtype, qk, v)}")
    return rows


def loss_rows(bench: Bench) -> list[dict[str, Any]]:
    """Forward and backward of the loss by rows a chunk, beside all logits at once."""
    n, d = (256, 32) if bench.toy else (16384, 2048)
    v = bench.vocab_size
    hidden = torch.randn(n, d, device=bench.device, dtype=bench.dtype, requires_grad=True)
    weight = (torch.randn(v, d, device=bench.device) * 0.02).requires_grad_()
    targets = torch.randint(v, (n,), device=bench.device)

    def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)).float(), targets, reduction="sum")

    def native(rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            weight = weight.to(hidden.dtype)
            return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)

        return loss

    chunks = (64, 128) if bench.toy else (1024, 2048, 4096, 8192, 16384)
    variants: list[tuple[str, Callable[..., Tensor]]] = []
    if bench.dtype != torch.float32 or NATIVE_LOSS:
        variants += [(f"ours, {rows} rows", cross_entropy(chunk_rows=rows)) for rows in chunks]
    if NATIVE_LOSS:
        variants += [(f"native, {rows} rows", native(rows)) for rows in chunks]
    else:
        say("  this torch has no F.linear_cross_entropy")
    variants.append(("all logits", full))
    found: list[dict[str, Any]] = []
    for name, loss in variants:
        bench.free()
        row: dict[str, Any] = {"loss": name}

        def both(loss: Callable[..., Tensor] = loss) -> None:
            torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))

        try:
            ms = bench.milliseconds(both, repeats=5, warmup=2)
            row |= {"ms": ms, "tflops": 6 * n * v * d / ms / 1e9, "peak_gib": bench.peak_gib()}
            say(f"  {name:<20} {ms:.1f} ms, {row['tflops']:.0f} TFLOP/s, peak {row['peak_gib']:.1f} GiB")
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["error"] = str(error).splitlines()[0]
            say(f"  {name:<20} does not run: {row['error']}")
        found.append(row)
    return found


def train(bench: Bench, sizes: tuple[int, ...], *, compile: bool, chunk_rows: int) -> list[dict[str, Any]]:
    """Whole steps (forward, loss, backward, clip, fused AdamW), micro-batches growing until memory is out."""
    if bench.dtype == torch.float32 and not NATIVE_LOSS:
        raise RuntimeError("in fp32 the loss needs F.linear_cross_entropy, which this torch lacks")
    bench.free()
    model = build_model(bench)
    model.train()
    if compile:
        for layer in model.layers:
            layer.compile(dynamic=False)  # the sizes tried would make it dynamic, which runs slower
    optimizer = adamw(model, lr=1e-5)
    loss_sum = cross_entropy(chunk_rows=chunk_rows)
    s, v = bench.seq_len, bench.vocab_size
    count = sum(p.numel() for p in model.parameters())
    attended = attention_flops(model, s)
    flops = {"6N": 6.0 * count, "causal": 6.0 * count + attended / 2, "PaLM": 6.0 * count + attended}
    peak = bench.results["machine"]["peak_flops"]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        if bench.left() < 45 and not bench.toy:
            say("  no time for larger micro-batches")
            break
        bench.free()
        tokens = torch.randint(v, (size, s + 1), device=bench.device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

        def step(inputs: Tensor = inputs, targets: Tensor = targets) -> None:
            with bench.autocast():
                hidden = model(inputs, hidden=True)
                loss = loss_sum(hidden.flatten(0, 1), model.head_weight, targets) / targets.numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        row: dict[str, Any] = {"compiled": compile, "micro_batch_size": size, "chunk_rows": chunk_rows}
        try:
            ms = bench.milliseconds(step)
        except torch.OutOfMemoryError:
            say(f"  micro-batch {size}: out of memory")
            optimizer.zero_grad()
            break
        rate = size * s / ms * 1e3
        row |= {"ms": ms, "tokens_per_s": rate, "peak_gib": bench.peak_gib()}
        row["mfu"] = {name: rate * each / peak for name, each in flops.items()}
        shares = ", ".join(f"{name} {share:.1%}" for name, share in row["mfu"].items())
        say(f"  micro-batch {size}: {ms:.0f} ms, {rate:,.0f} tokens/s, peak {row['peak_gib']:.1f} GiB")
        say(f"    MFU {shares}")
        rows.append(row)
    return rows


def table(results: dict[str, Any]) -> list[str]:
    """The one table, for a README."""
    where = results["machine"]
    lines = [
        f"{where['device']}, torch {where['torch']}, peak {where['peak_flops'] / 1e12:.1f} TFLOP/s",
        "| what | tokens/s | MFU 6N | MFU causal | MFU PaLM | ms | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in ("eager", "compiled"):
        if results.get(part):
            best = max(results[part], key=lambda row: row["tokens_per_s"])
            mfu = " | ".join(f"{share:.1%}" for share in best["mfu"].values())
            what = f"train step, {part}, {best['micro_batch_size']} sequences"
            size = f"{best['ms']:.0f} | {best['peak_gib']:.1f}"
            lines.append(f"| {what} | {best['tokens_per_s']:,.0f} | {mfu} | {size} |")
    for row in results.get("loss", []):
        if "ms" in row:
            lines.append(f"| loss, {row['loss']} | | | | | {row['ms']:.1f} | {row['peak_gib']:.1f} |")
    for row in results.get("attention", []):
        if "tflops" in row:
            lines.append(f"| attention, {row['kernel']} | | | | | {row['forward_backward_ms']:.2f} | |")
    return lines


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU")
    parser.add_argument("--out", type=Path, help="write all results as JSON")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="for everything, below 560")
    options = parser.parse_args(arguments)
    budget = min(options.budget_seconds, 560.0)
    started = time.monotonic()
    device = torch.device("cpu" if options.toy else "cuda")
    bench = Bench(device, options.toy, started + budget)
    bench.results["machine"] = machine(bench)
    say(json.dumps(bench.results["machine"]))

    def best_rows() -> int:
        ours = [r for r in bench.results.get("loss", []) if r["loss"].startswith("ours") and "ms" in r]
        return int(min(ours, key=lambda r: r["ms"])["loss"].split()[1]) if ours else 4096

    sizes = (1, 2) if options.toy else (1, 2, 4, 8)

    def best_sizes() -> tuple[int, ...]:  # compiling takes time and saves memory: the best size and its double
        eager = bench.results.get("eager")
        if not eager:
            return sizes
        best: int = max(eager, key=lambda r: r["tokens_per_s"])["micro_batch_size"]
        return best, 2 * best

    parts: dict[str, Callable[[], Any]] = {
        "attention": lambda: attention(bench),
        "loss": lambda: loss_rows(bench),
        "eager": lambda: train(bench, sizes, compile=False, chunk_rows=best_rows()),
        "compiled": lambda: train(bench, best_sizes(), compile=True, chunk_rows=best_rows()),
    }
    for name, part in parts.items():
        if bench.left() < 5:
            say(f"{name}: no time left")
            continue
        say(f"{name} ({bench.left():.0f} s left)")
        try:
            bench.results[name] = part()
        except Exception as error:  # what failed must not take the rest with it
            traceback.print_exc()
            bench.results[f"{name}_error"] = f"{type(error).__name__}: {error}"
        if options.out:
            options.out.write_text(json.dumps(bench.results, indent=1))
    bench.results["seconds"] = time.monotonic() - started
    if options.out:
        options.out.write_text(json.dumps(bench.results, indent=1))
    say("\n".join(table(bench.results)))
    return bench.results


if __name__ == "__main__":
    main()
