"""A PLM in llama.cpp's own architecture `plm` beside the form `deepseek2`: file, cache, time of a token.

    python benchmarks/latent_gguf.py [plm_20m plm_1.8b] [--kinds F16,Q8_0] [--contexts 128,1024,4096]

plm_20m is the preset, plm_1.8b four layers of the paper's model; weights are random. Each variant reads a prompt once
for each context. In each round every variant then writes --tokens; every other round reverses the order, and medians
are compared. Times are the processor time of one thread, which other work on the machine disturbs less. `plm` runs
without flash attention, on which llama.cpp aborts, `deepseek2` without and with it. llama.cpp is the package
xllamacpp, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from llamacpp import features
from side_by_side import machine

from plmtune.devices.latent_form import of_file
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.runtimes import open_runtime
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte
from plmtune.units import show_bytes

FORMS = {"plm": None, "deepseek2": "deepseek2"}
VARIANTS = (("plm", False), ("deepseek2", False), ("deepseek2", True))
SMALL = {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}


def build(name: str, longest: int) -> Decoder:
    torch.manual_seed(0)
    if name == "plm_1.8b":
        return plm(4096, num_layers=4, max_seq_len=longest).eval()
    return plm(
        4096,
        attention=component("attention", "mla", **SMALL),
        ffn=component("ffn", "squared_relu", hidden_dim=1024),
        embed_dim=256,
        num_layers=22,
        num_heads=4,
        max_seq_len=longest,
    ).eval()


def serve(calls: Connection, path: Path, capacity: int, flash: bool) -> None:
    """Open a file, and answer each (ids, tokens) with the processor time of reading ids and writing, until None."""
    runtime: Any = open_runtime(path, threads=1, context=capacity, flash_attention=flash, prefer="xllamacpp")
    greedy = {"samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": True}
    calls.send(runtime.name)
    while (asked := calls.recv()) is not None:
        start = time.process_time()
        runtime._server.handle_completions({"prompt": asked[0], "n_predict": asked[1], **greedy})
        calls.send(time.process_time() - start)


def served(path: Path, capacity: int, flash: bool, stack: ExitStack) -> Callable[[list[int], int], float]:
    """`serve` in a process of its own."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(there, path, capacity, flash), daemon=True)
    process.start()
    there.close()
    here.recv()

    def timed(ids: list[int], tokens: int) -> float:
        here.send((ids, tokens))
        found: float = here.recv()
        return found

    stack.callback(process.join)
    stack.callback(here.send, None)
    return timed


def run(name: str, kind: str, contexts: list[int], arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    capacity = max(contexts) + arguments.tokens + 2
    model = build(name, capacity)
    paths = {form: folder / f"{name}-{form}-{kind}.gguf" for form in FORMS}
    for form, path in paths.items():
        write_gguf(model, byte(), path, kind=kind, as_=FORMS[form])  # type: ignore[arg-type]
    forms = of_file(paths["plm"])
    assert forms is not None
    sizes = {form: path.stat().st_size for form, path in paths.items()}
    cached = {"plm": forms[0].cached, "deepseek2": forms[1].cached}
    found: dict[str, dict[str, float]] = {}
    ids = random.Random(0).choices(range(256), k=max(contexts))
    with ExitStack() as stack:
        timed = {
            f"{form}, fa {'on' if flash else 'off'}": served(paths[form], capacity, flash, stack)
            for form, flash in VARIANTS
        }
        for context in contexts:
            taken: dict[str, list[float]] = {key: [] for key in timed}
            for number in range(-1, arguments.rounds):
                for key in list(timed)[:: 1 if number % 2 == 0 else -1]:
                    seconds = timed[key](ids[:context], arguments.tokens)
                    if number >= 0:
                        taken[key].append(seconds / arguments.tokens)
            found[str(context)] = {key: 1 / statistics.median(seconds) for key, seconds in taken.items()}
    show(name, kind, sizes, cached, found)
    return {"model": name, "kind": kind, "bytes": sizes, "cached": cached, "tokens_per_second": found}


def show(
    name: str, kind: str, sizes: dict[str, int], cached: dict[str, int], found: dict[str, dict[str, float]]
) -> None:
    saved, grown = cached["plm"] - cached["deepseek2"], sizes["deepseek2"] - sizes["plm"]
    print(
        f"\n{name}, {kind}: file {show_bytes(sizes['plm'])} -> {show_bytes(sizes['deepseek2'])} "
        f"({grown / sizes['plm']:+.0%}), cache {cached['plm']:,} -> {cached['deepseek2']:,} bytes a token "
        f"({cached['plm'] / cached['deepseek2']:.1f}x): less memory from {-(-grown // saved):,} tokens on\n"
    )
    print("| tokens/s at | " + " | ".join(f"{int(context):,}" for context in found) + " |")
    print("|" + "---|" * (len(found) + 1))
    variants = list(next(iter(found.values())))
    for key in variants:
        print(f"| {key} | " + " | ".join(f"{speeds[key]:,.1f}" for speeds in found.values()) + " |")
    for key in variants[1:]:
        ratios = (speeds[key] / speeds[variants[0]] for speeds in found.values())
        print(f"| {key} / {variants[0]} | " + " | ".join(f"{ratio:.2f}x" for ratio in ratios) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["plm_20m", "plm_1.8b"], metavar="MODEL")
    parser.add_argument("--kinds", default="Q8_0")
    parser.add_argument("--contexts", default="128,1024,4096")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="written by each in a round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    contexts = sorted(map(int, arguments.contexts.split(",")))
    print(f"{machine()}\nllama.cpp: {features()}", flush=True)
    results = []
    for name in arguments.models:
        for kind in arguments.kinds.split(","):
            with tempfile.TemporaryDirectory() as folder:
                results.append(run(name, kind, contexts, arguments, Path(folder)))
    if arguments.json:
        text = json.dumps({"machine": machine(), "llama.cpp": features(), "results": results}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
