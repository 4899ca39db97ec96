"""How fast a model decodes here, and how much memory it takes: checkpoints and exported files.

Each target is measured in a process of its own, so that its peak of memory is its own:

    python -m plmtune.devices.measure ANSWER < request.json     # what `measure` starts
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from plmtune.devices.measured_models import Sparse, open_model
from plmtune.errors import UserError
from plmtune.models.checkpoint_files import find_checkpoint
from plmtune.ranges import AT_LEAST_1, check
from plmtune.training.determinism import measure_seconds

READ_BYTES = 256 * 2**20


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes/s of reading a device's memory that no cache holds, on a CPU with torch's threads; the best of six."""
    device = torch.device(device)
    numbers = torch.ones(READ_BYTES // 4 if device.type == "cpu" else 2**28, device=device)
    return numbers.nbytes / min(measure_seconds(numbers.sum, device) for _ in range(6))


@dataclass(frozen=True)
class Options:
    """How a target is measured.

    Args:
        contexts: tokens in the cache when it begins to write; those that the model cannot hold are left out.
        new_tokens: written at each.
        threads: of the CPU; None: torch's default.
        dtype: fp32 or bf16, of a PyTorch model; None: the file's, of a config bf16.
        sparse: a PyTorch model skips the zeros of squared ReLU where that is measured to pay, everywhere, or nowhere.
        read_prompt: False: a PyTorch model begins with repetitions of a short text in its cache, which is as fast to
            decode from; other runtimes always read.
        bandwidth: bytes/s of this machine's memory; None: it is measured.
        device: of a PyTorch model; None: cuda where there is one, else the CPU.
        flash_attention: of llama.cpp, for a .gguf file; None: its own choice.
    """

    contexts: Sequence[int] = (128, 2048)
    new_tokens: int = 32
    threads: int | None = None
    dtype: str | None = None
    sparse: Sparse = "off"
    read_prompt: bool = True
    bandwidth: float | None = None
    device: str | None = None
    flash_attention: bool | None = None

    def __post_init__(self) -> None:
        check(AT_LEAST_1, new_tokens=self.new_tokens, context=min(self.contexts, default=1))
        if not self.contexts:
            raise ValueError("there must be at least one context")

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Measurement:
    """One target at one length of context.

    Attributes:
        target: what was measured.
        runtime: the program that ran it.
        weights: their format, such as bf16, int4_g32, Q4_0, and llama.cpp's flash attention where set.
        context: tokens read before the first was written.
        threads: of the CPU.
        first_token: seconds from an empty cache to the first token; None where the prompt was not read.
        prefill: tokens/s of reading the prompt.
        decode: tokens/s of writing, from the median token.
        peak_memory: most bytes that the process has taken since it began to open the model.
        weight_bytes, cache_bytes: read for one token; None where the file does not say.
        share: of this machine's bandwidth that reading them once a token takes.
        sparse: layers that skip the zeros of squared ReLU, of how many; None where there are none.
    """

    target: str
    runtime: str
    weights: str
    context: int
    threads: int
    first_token: float | None
    prefill: float | None
    decode: float
    peak_memory: int
    weight_bytes: int | None
    cache_bytes: int | None
    share: float | None
    sparse: tuple[int, int] | None = None


def measure(target: str, *, log: Callable[[str], None] = lambda text: None, **options: Any) -> list[Measurement]:
    """Measure a target in a process of its own.

    Args:
        target: a checkpoint, a run, a directory that transformers reads, a .gguf or .pte file, or model=NAME: a config
            with random weights.
        log: gets a line for each step.
        options: those of `Options`.
    """
    asked = Options(**options)
    if Path(target).is_dir():
        with contextlib.suppress(UserError):  # a directory of transformers, or none: the process reports it
            find_checkpoint(target)  # which warns of an interrupted run: the process has no terminal
    # Measured here, because what it reads is no memory of the target.
    bandwidth = asked.bandwidth or read_bandwidth(asked.torch_device)
    request = {"target": target, **asdict(asked), "bandwidth": bandwidth}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # -P: a file in the current folder cannot take a module's place.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(answer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # llama.cpp writes to it
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None and child.stderr is not None
        child.stdin.write(json.dumps(request))
        child.stdin.close()
        last = ""
        try:
            for line in child.stderr:
                if line.startswith(_SAYS):
                    log(line.removeprefix(_SAYS).rstrip())
                else:
                    last = line.strip() or last
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stderr.close()
        if not answer.is_file():
            why = "it ran out of memory, or was stopped" if code in (-9, 137) else last or "it said nothing"
            raise UserError(f"{target} could not be measured: its process ended with {code} ({why:.500}).")
        found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise UserError(found["error"])
    return [
        Measurement(**entry | {"sparse": tuple(entry["sparse"]) if entry["sparse"] else None})
        for entry in found["measurements"]
    ]


_SAYS = "plmtune says: "


def main() -> None:
    """Read a request from stdin; write the measurements, or an error, to the file that the command line names."""
    request, answer = json.load(sys.stdin), Path(sys.argv[1])
    found: dict[str, Any]
    try:
        measured = measure_here(**request, log=lambda text: print(_SAYS + text, file=sys.stderr, flush=True))
        found = {"measurements": [asdict(entry) for entry in measured]}
    except (UserError, ValueError) as error:
        found = {"error": f"{error}"}
    answer.write_text(json.dumps(found), encoding="utf-8")


def measure_here(target: str, *, log: Callable[[str], None] = lambda text: None, **options: Any) -> list[Measurement]:
    """Do what `measure` does in this process, whose earlier peaks of memory count as well."""
    asked = Options(**options)
    device, contexts, new_tokens = asked.torch_device, sorted(set(asked.contexts)), asked.new_tokens
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    threads = torch.get_num_threads()
    bandwidth = asked.bandwidth or read_bandwidth(device)
    before = psutil.Process().memory_info().rss
    log(f"{target}: opening")
    model = open_model(
        target, max(contexts) + new_tokens, threads, asked.dtype, asked.sparse, device, asked.flash_attention
    )
    try:
        fitting = [context for context in contexts if context + new_tokens <= model.opened.context]
        if not fitting:
            raise UserError(
                f"{target} holds {model.opened.context:,} tokens, which is less than the shortest context "
                f"({min(contexts):,}) and the {new_tokens:,} that are written after it."
            )
        for context in contexts[len(fitting) :]:
            log(f"{target}: {context:,} and {new_tokens:,} tokens are more than the {model.opened.context:,} it holds")
        measured = []
        model.timed(8 if model.opened.context > 16 else 1, 1)  # warms up
        for context in fitting:
            log(f"{target}: context {context:,}")
            first, token = model.timed(context, new_tokens, read_prompt=asked.read_prompt)
            weights = model.weight_bytes()
            cache = None if model.bytes_cached is None else model.bytes_cached * context
            measured.append(
                Measurement(
                    target=target,
                    runtime=model.opened.name,
                    weights=model.weights,
                    context=context,
                    threads=threads,
                    first_token=first,
                    prefill=context / first if first else None,
                    decode=1 / token,
                    peak_memory=_peak(before, device),
                    weight_bytes=weights,
                    cache_bytes=cache,
                    share=None if weights is None else (weights + (cache or 0)) / token / bandwidth,
                    sparse=model.sparse,
                )
            )
        return measured
    finally:
        model.opened.close()


def _peak(before: int, device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # On Linux getrusage's peak includes the program that started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
    except (OSError, StopIteration):
        peak = psutil.Process().memory_info().rss
    return max(peak - before, 0)


if __name__ == "__main__":
    # Without it a tokenizer warns at each fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
