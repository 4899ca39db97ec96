"""Prompts and tokens: ours in bf16, int8 and int4 beside llama.cpp's types, each with its own loop and best settings.

    plmtune convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    python benchmarks/llamacpp.py smollm2 plm_100m [--contexts 128,2048] [--threads 1,2] [--rounds 5] [--json F]

A MODEL is a checkpoint directory or a random model of edge_decode.py (plm_100m, plm_1.8b). In each round every variant
reads a prompt of random tokens into an empty cache and then writes --tokens; every other round reverses the order, and
medians are compared. llama.cpp runs with flash attention off and on, where it does not abort (on arch plm it does),
and the faster of the two counts, for prompts and for tokens separately.

llama.cpp is the package llama_cpp (compiled for this processor; its C calls) or, without it, xllamacpp (a wheel for any
processor; the server's own loop and figures), whose features are printed. Q4_K_M needs llama_cpp. With --cpu-time the
processor time of one thread is measured in place of the clock's, which other work on the machine disturbs less.
llama.cpp runs in processes of its own: its AMX kernels end a process in which torch uses AMX too. Compiled with GCC 12,
they end any process: use another compiler there.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
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

import torch
from edge_decode import VOCABULARY, build
from side_by_side import machine

import plmtune
from plmtune.errors import UserError
from plmtune.export.gguf_quantize import quantize_gguf
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.lint import WRITTEN
from plmtune.export.runtimes import InferenceRuntime, Timing, open_runtime
from plmtune.inference.kernel_choice import prepack
from plmtune.modules.decoder import Decoder
from plmtune.quantization import schemes
from plmtune.quantization.quantize import quantize
from plmtune.tokenizers.tokenizer_files import byte

KINDS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M")
OURS = ("bf16", "int8", "int4", "int8_dynamic", "int8_dynamic_int4")
FLASH = {False: "fa off", True: "fa on"}
# (ours, llama.cpp's); of several the fastest
RATIOS = (
    ("bf16", ("F16",)),
    ("bf16", ("F16", "BF16")),
    ("int8", ("Q8_0",)),
    ("int4", ("Q4_0",)),
    ("int4", ("Q4_0", "Q4_K_M")),
    ("int8_dynamic", ("Q8_0",)),
    ("int8_dynamic_int4", ("Q4_0",)),
)
Timed = Callable[[list[int], int], Timing]


def ours(model: Decoder, capacity: int, clock: Callable[[], float]) -> Timed:
    cache = model.new_cache(1, capacity)

    @torch.inference_mode()
    def step(ids: list[int]) -> int:
        hidden = model(torch.tensor([ids]), cache=cache, hidden=True)[:, -1:]
        return int(model.logits(hidden).argmax())

    def timed(ids: list[int], tokens: int) -> Timing:
        cache.truncate(0)
        return by_step(step, ids, tokens, clock)

    return timed


def theirs(runtime: InferenceRuntime, clock: Callable[[], float]) -> Timed:
    if "xllamacpp" in runtime.name:
        return runtime.timed  # a step of it is a whole request

    def timed(ids: list[int], tokens: int) -> Timing:
        def step(read: list[int]) -> int:
            return runtime.start(read) if read is ids else runtime.step(read[0])

        return by_step(step, ids, tokens, clock)

    return timed


def serve(calls: Connection, path: Path, threads: int, capacity: int, flash: bool, cpu_time: bool) -> None:
    """Open a file, send its runtime's name or why not, and answer each (ids, tokens) with a Timing until None comes."""
    try:
        runtime = open_runtime(path, threads=threads, context=capacity, flash_attention=flash)
    except UserError as error:
        calls.send(error)
        return
    timed = theirs(runtime, time.process_time if cpu_time else time.perf_counter)
    calls.send(runtime.name)
    while (asked := calls.recv()) is not None:
        calls.send(timed(*asked))


def served(
    path: Path, threads: int, capacity: int, flash: bool, cpu_time: bool, stack: ExitStack
) -> tuple[str, Timed] | None:
    """`theirs` in a process of its own, with the runtime's name; None where it cannot be opened so."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(
        target=serve, args=(there, path, threads, capacity, flash, cpu_time), daemon=True
    )
    process.start()
    there.close()
    answer = here.recv()
    if isinstance(answer, UserError):
        process.join()
        return None

    def timed(ids: list[int], tokens: int) -> Timing:
        here.send((ids, tokens))
        found: Timing = here.recv()
        return found

    stack.callback(process.join)
    stack.callback(here.send, None)
    return answer, timed


def by_step(step: Callable[[list[int]], int], ids: list[int], tokens: int, clock: Callable[[], float]) -> Timing:
    start = clock()
    token, taken = step(ids), []
    prompt = clock() - start
    for _ in range(tokens):
        start = clock()
        token = step([token])
        taken.append(clock() - start)
    return Timing(prompt, statistics.median(taken))


def variants(
    model: Decoder, capacity: int, threads: int, clock: Callable[[], float], folder: Path, stack: ExitStack
) -> dict[str, Timed]:
    """Everything that is compared, of one model's fp32 weights; llama.cpp's names end with their setting."""
    found: dict[str, Timed] = {}
    for scheme in OURS:
        held = copy.deepcopy(model).to(torch.bfloat16)
        if scheme != "bf16":
            quantize(held, getattr(schemes, scheme)(held))
        prepack(held)
        found[f"ours {scheme}"] = ours(held, capacity, clock)
    for kind in KINDS:
        path = folder / f"{kind}.gguf"
        try:
            if not path.exists() and kind in WRITTEN:
                write_gguf(model, byte(), path, kind=kind)
            elif not path.exists():
                quantize_gguf(folder / "F16.gguf", path, kind, threads=threads)
        except UserError as error:
            print(f"llama.cpp {kind} is left out: {error}")
            continue
        for flash, words in FLASH.items():
            if opened := served(path, threads, capacity, flash, clock is time.process_time, stack):
                found[f"{opened[0]} {kind}, {words}"] = opened[1]
    return found


def run(name: str, threads: int, contexts: list[int], arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    capacity = max(contexts) + arguments.tokens + 2
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    if name in ("plm_100m", "plm_1.8b"):
        model = build(name, capacity)
    else:
        model, _ = plmtune.load(name, dtype=torch.float32)
        model.native = None
    model.requires_grad_(False).eval()
    with ExitStack() as stack:
        timed = variants(model, capacity, threads, clock, folder, stack)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for context in contexts:
            taken: dict[str, list[Timing]] = {key: [] for key in timed}
            for number in range(-1, arguments.rounds):
                ids = random.Random(number).choices(range(min(model.vocab_size, VOCABULARY)), k=context)
                for key in list(timed)[:: 1 if number % 2 == 0 else -1]:
                    time.sleep(0.02)  # threads of the one before have stopped waiting for work
                    entry = timed[key](ids if number >= 0 else ids[:16], arguments.tokens)
                    if number >= 0:
                        taken[key].append(entry)
            found[str(context)] = {
                key: {
                    "prefill": context / statistics.median(entry.prompt for entry in entries),
                    "decode": 1 / statistics.median(entry.token for entry in entries),
                }
                for key, entries in taken.items()
            }
    show(name, threads, found)
    return {"model": name, "threads": threads, "tokens_per_second": found}


def show(name: str, threads: int, found: dict[str, dict[str, dict[str, float]]]) -> None:
    columns = [(what, context) for what in ("prefill", "decode") for context in found]
    print(f"\n{name}, {threads} thread{'s' * (threads > 1)}, tokens/s\n")
    print("| | " + " | ".join(f"{what} {int(context):,}" for what, context in columns) + " |")
    print("|" + "---|" * (len(columns) + 1))
    for key in next(iter(found.values())):
        print(f"| {key} | " + " | ".join(f"{found[context][key][what]:,.1f}" for what, context in columns) + " |")

    def best(kinds: tuple[str, ...], what: str, context: str) -> float | None:
        speeds = found[context]
        return max((speeds[key][what] for key in speeds if any(f" {kind}," in key for kind in kinds)), default=None)

    for form, kinds in RATIOS:
        cells = []
        for what, context in columns:
            other = best(kinds, what, context)
            cells.append("-" if other is None else f"{found[context][f'ours {form}'][what] / other:.2f}x")
        print(f"| ours {form} / llama.cpp {' or '.join(kinds)} | " + " | ".join(cells) + " |")
    for form in OURS[1:]:
        ratios = (found[context][f"ours {form}"][what] / found[context]["ours bf16"][what] for what, context in columns)
        print(f"| ours {form} / ours bf16 | " + " | ".join(f"{ratio:.2f}x" for ratio in ratios) + " |", flush=True)


def features() -> str:
    """What llama.cpp was compiled for."""
    try:
        import llama_cpp

        return str(llama_cpp.llama_print_system_info().decode())
    except ImportError:
        import xllamacpp

        return str(xllamacpp.get_system_info())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--contexts", default="128,2048")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="written by each in a round")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, with --threads 1 and llama_cpp")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.cpu_time and (arguments.threads != "1" or importlib.util.find_spec("llama_cpp") is None):
        parser.error("--cpu-time needs --threads 1 and the package llama_cpp")
    contexts = sorted(map(int, arguments.contexts.split(",")))
    print(machine())
    print(f"llama.cpp: {features()}", flush=True)
    results = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            for threads in map(int, arguments.threads.split(",")):
                results.append(run(name, threads, contexts, arguments, Path(folder)))
    if arguments.json:
        text = json.dumps({"machine": machine(), "llama.cpp": features(), "results": results}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
