"""How fast a model really is here, and how much memory it takes: checkpoints, quantized ones, files for other runtimes.

Each target is measured in a process of its own, so that its peak of memory is its own:

    python -m plmtune.devices.measure < request.json     # what `measure` starts
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from plmtune import dtypes
from plmtune.devices import sparse_decode
from plmtune.errors import UserError
from plmtune.inference.kernel_choice import prepack
from plmtune.io import hub
from plmtune.models.checkpoint_files import checkpoint_directory, find_checkpoint
from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SquaredReLU
from plmtune.modules.quantized import Quantized

Sparse = Literal["auto", "on", "off"]
SAMPLE = 256  # tokens of text that are read where no prompt is, and repeated to fill the cache


@dataclass(frozen=True)
class Measurement:
    """One target at one length of context.

    Attributes:
        target: what was measured.
        runtime: the program that ran it.
        weights: how they are stored, such as bf16, int4_g32, Q4_0; behind it llama.cpp's flash attention, where set.
        context: tokens read before the first was written.
        threads: of the CPU.
        first_token: seconds from an empty cache to the first token; None where the prompt was not read.
        prefill: tokens/s of reading the prompt.
        decode: tokens/s of writing, from the median token.
        peak_memory: bytes that the process took more than before it opened the model, at most, up to here.
        weight_bytes, cache_bytes: read for one token, by their sizes; None where the file does not say.
        share: of this machine's bandwidth, which reading them once a token takes.
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


def measure(
    target: str,
    *,
    contexts: Sequence[int] = (128, 2048),
    new_tokens: int = 32,
    threads: int | None = None,
    dtype: str | None = None,
    sparse: Sparse = "off",
    read_prompt: bool = True,
    bandwidth: float | None = None,
    device: str | None = None,
    flash_attention: bool | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Measure a target in a process of its own.

    Args:
        target: a checkpoint, a run, a directory that transformers reads, a .gguf or .pte file, or model=NAME: a config
            with random weights.
        contexts: tokens in the cache when it begins to write; those that the model cannot hold are left out.
        new_tokens: written at each.
        threads: of the CPU; None: what torch takes by itself.
        dtype: fp32 or bf16, of ours; None: as the file has it, of a config bf16.
        sparse: ours skips the zeros of squared ReLU: where that is measured to pay, everywhere, or nowhere.
        read_prompt: else ours begins with what a short text left in the cache, over and over, which is as fast to
            decode from; other runtimes can only read.
        bandwidth: bytes/s of this machine's memory; None: it is measured.
        device: of ours; None: cuda where there is one, else the CPU.
        flash_attention: of llama.cpp, for a .gguf file; None: as it chooses.
        say: is told what is done.

    Raises:
        UserError: if there is no such target, it does not fit, or the process ended.
        ValueError: for impossible numbers.
    """
    _check(contexts, new_tokens)
    if Path(target).is_dir():
        with contextlib.suppress(UserError):  # a directory of transformers, or none: the process says it
            find_checkpoint(target)  # which says where a run was interrupted: the process says nothing on its own
    bandwidth = bandwidth or _bandwidth_with(threads, _place(device))  # here: what it reads is no memory of the target
    request = {
        "target": target,
        "contexts": sorted(set(contexts)),
        "new_tokens": new_tokens,
        "threads": threads,
        "dtype": dtype,
        "sparse": sparse,
        "read_prompt": read_prompt,
        "bandwidth": bandwidth,
        "device": device,
        "flash_attention": flash_attention,
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # -P: a file of the folder that the command is given in takes no module's place.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(answer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # which llama.cpp writes to
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
                    if say is not None:
                        say(line.removeprefix(_SAYS).rstrip())
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
    return [_read(entry) for entry in found["measurements"]]


def _read(entry: dict[str, Any]) -> Measurement:
    return replace(Measurement(**entry), sparse=tuple(entry["sparse"]) if entry["sparse"] else None)


def _check(contexts: Sequence[int], new_tokens: int) -> None:
    for name, value in (("new_tokens", new_tokens), *(("context", context) for context in contexts)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not contexts:
        raise ValueError("there must be at least one context")


_SAYS = "plmtune says: "


def main() -> None:
    """Read a request from stdin, and write what was measured, or why not, to the file that is named."""
    request, answer = json.load(sys.stdin), Path(sys.argv[1])
    found: dict[str, Any]
    try:
        measured = measure_here(**request, say=lambda text: print(_SAYS + text, file=sys.stderr, flush=True))
        found = {"measurements": [asdict(entry) for entry in measured]}
    except (UserError, ValueError) as error:
        found = {"error": f"{error}"}
    answer.write_text(json.dumps(found), encoding="utf-8")


def measure_here(
    target: str,
    *,
    contexts: Sequence[int],
    new_tokens: int,
    threads: int | None = None,
    dtype: str | None = None,
    sparse: Sparse = "off",
    read_prompt: bool = True,
    bandwidth: float | None = None,
    device: str | None = None,
    flash_attention: bool | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """What `measure` does, in this process, whose earlier peaks of memory count as well."""
    _check(contexts, new_tokens)
    tell = say or (lambda text: None)
    if threads is not None:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    place = _place(device)
    bandwidth = bandwidth or read_bandwidth(place)
    before = psutil.Process().memory_info().rss
    tell(f"{target}: opening")
    opened = _open(target, max(contexts) + new_tokens, threads, dtype, sparse, place, flash_attention)
    try:
        fitting = [context for context in contexts if context + new_tokens <= opened.longest]
        if not fitting:
            raise UserError(
                f"{target} holds {opened.longest:,} tokens, which is less than the shortest context "
                f"({min(contexts):,}) and the {new_tokens:,} that are written after it."
            )
        for context in sorted(set(contexts) - set(fitting)):
            tell(f"{target}: {context:,} and {new_tokens:,} tokens are more than the {opened.longest:,} it holds")
        measured = []
        opened.warm_up()
        for context in fitting:
            tell(f"{target}: context {context:,}")
            first, token = opened.timed(context, new_tokens, read_prompt=read_prompt)
            weights, cache = opened.weight_bytes(), opened.cache_bytes(context)
            share = None if weights is None else (weights + (cache or 0)) / token / bandwidth
            measured.append(
                Measurement(
                    target=target,
                    runtime=opened.runtime,
                    weights=opened.weights,
                    context=context,
                    threads=threads,
                    first_token=first,
                    prefill=context / first if first else None,
                    decode=1 / token,
                    peak_memory=_peak(before, place),
                    weight_bytes=weights,
                    cache_bytes=cache,
                    share=share,
                    sparse=opened.sparse,
                )
            )
        return measured
    finally:
        opened.close()


def _place(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _bandwidth_with(threads: int | None, device: torch.device) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return read_bandwidth(device)
    finally:
        torch.set_num_threads(before)


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s at which a device's memory is read."""
    if device.type == "cpu":
        from plmtune.devices import calibrate

        return calibrate.read_bandwidth()
    numbers = torch.ones(2**28, device=device)
    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        numbers.sum()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return numbers.nbytes / best


def _peak(before: int, device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage: on Linux its peak is also that of the program which started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
    except (OSError, StopIteration):
        peak = psutil.Process().memory_info().rss
    return max(peak - before, 0)


class _Opened(ABC):
    """A model that is measured.

    Attributes:
        runtime, weights, sparse: as in Measurement.
        longest: tokens that it holds.
    """

    runtime: str
    weights: str
    longest: int
    sparse: tuple[int, int] | None = None

    @abstractmethod
    def timed(self, context: int, new_tokens: int, *, read_prompt: bool = True) -> tuple[float | None, float]:
        """Read that many tokens into an empty cache, then write some more.

        Returns: seconds to the first token, None where the cache was filled in another way, and of each later token.
        """

    @abstractmethod
    def weight_bytes(self) -> int | None:
        """Bytes of weights that one token reads."""

    @abstractmethod
    def cache_bytes(self, context: int) -> int | None:
        """Bytes of the cache that one token reads."""

    def warm_up(self) -> None:
        self.timed(8 if self.longest > 16 else 1, 1)

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


class _Ours(_Opened):
    """A decoder of ours.

    Args:
        sample: tokens of a text, repeated as often as a prompt is long; None: random ones.
    """

    runtime = "plmtune"

    def __init__(self, model: Decoder, capacity: int, sparse: Sparse, sample: Sequence[int] | None) -> None:
        self.model, self.longest = model, min(model.max_seq_len, capacity)
        self.weights = _form(model)
        self.cache = model.new_cache(1, self.longest)
        random = torch.randint(model.vocab_size, (SAMPLE,), generator=torch.Generator().manual_seed(0))
        self._sample = torch.tensor(sample) if sample else random
        self._next = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        able = len(sparse_decode.squared_relus(model))
        if able:
            on = 0
            if sparse == "auto":
                on = sum(choice.on for choice in sparse_decode.choose(model, self._sample))
            elif sparse == "on":
                on = sparse_decode.switch(model, True)
            self.sparse = (on, able)

    def _ids(self, count: int) -> Tensor:
        return self._sample.repeat(-(-count // len(self._sample)))[None, :count].to(self.model.device)

    def timed(self, context: int, new_tokens: int, *, read_prompt: bool = True) -> tuple[float | None, float]:
        start = time.perf_counter()
        if read_prompt:
            self.start(context)
        else:
            self.fill(context)
        first = time.perf_counter() - start if read_prompt else None
        return first, statistics.median(self.step() for _ in range(new_tokens))

    @torch.inference_mode()
    def start(self, context: int) -> None:
        """Read that many tokens into an empty cache."""
        self.cache.truncate(0)
        self._next = self._likeliest(self._ids(context))
        self._next.tolist()  # waits for the device

    @torch.inference_mode()
    def fill(self, context: int) -> None:
        """Let the cache hold what the sample's beginning leaves there, over and over: so zeros are those of text."""
        read = min(context, SAMPLE)
        self.start(read)
        for layer in self.cache.layers:
            for buffer in layer:
                for begin in range(read, context, read):
                    buffer[:, :, begin : min(begin + read, context)] = buffer[:, :, : min(read, context - begin)]
        self.cache.length = context

    @torch.inference_mode()
    def step(self) -> float:
        """Write one more token; return the seconds it took."""
        start = time.perf_counter()
        self._next = self._likeliest(self._next)
        self._next.tolist()
        return time.perf_counter() - start

    def _likeliest(self, ids: Tensor) -> Tensor:
        return self.model.logits(self.model(ids, cache=self.cache, hidden=True)[:, -1:]).argmax(-1)

    @torch.inference_mode()
    def weight_bytes(self) -> int:
        total = 0
        for name, module in self.model.named_modules():
            if name == "tok_embeddings" and not self.model.tied:
                continue  # of which one row is looked up
            if isinstance(module, Quantized):
                held = module.dense
                total += module.format.num_bytes((module.num_rows, module.width)) if held is None else held.nbytes
            total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        return total - self._skipped()

    def _skipped(self) -> int:
        """Bytes of `down` that a token does not read, by one that takes the last one's place in the cache."""
        skipping = [ffn for ffn in sparse_decode.squared_relus(self.model).values() if ffn.sparse]
        for ffn in skipping:
            ffn.record_sparsity = True
        self.cache.truncate(self.cache.length - 1)
        self.model(self._next, cache=self.cache, hidden=True)
        for ffn in skipping:
            ffn.record_sparsity = False
        return sum(_zeros(ffn) for ffn in skipping)

    def cache_bytes(self, context: int) -> int:
        return self.cache.nbytes // self.cache.max_seq_len * context

    def close(self) -> None:
        del self.model, self.cache


def _zeros(ffn: SquaredReLU) -> int:
    assert ffn.sparsity is not None
    return int(float(ffn.sparsity.mean()) * ffn.down_proj.weight.nbytes)


def _form(model: Decoder) -> str:
    """The form that most of a model's numbers are in."""
    sizes: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, Quantized):
            name = module.format.name
            sizes[name] = sizes.get(name, 0) + module.num_rows * module.width
        else:
            for parameter in module.parameters(recurse=False):
                name = dtypes.name_of(parameter.dtype)
                sizes[name] = sizes.get(name, 0) + parameter.numel()
    return max(sizes, key=lambda name: sizes[name])


class _Served(_Opened):
    """A file that another program runs."""

    def __init__(self, path: Path, capacity: int, threads: int, flash_attention: bool | None) -> None:
        from plmtune.export.runtimes import open_runtime

        self._held, self._cache_bytes, self.weights = _stored(path)
        self._opened = open_runtime(path, threads=threads, context=capacity, flash_attention=flash_attention)
        if flash_attention is not None:
            self.weights += f", flash attention {'on' if flash_attention else 'off'}"
        self.runtime, self.longest = self._opened.name, self._opened.context
        self._random = torch.Generator().manual_seed(0)

    def timed(self, context: int, new_tokens: int, *, read_prompt: bool = True) -> tuple[float | None, float]:
        ids = torch.randint(self._opened.vocab_size, (context,), generator=self._random).tolist()
        found = self._opened.timed(ids, new_tokens)
        return found.prompt, found.token

    def weight_bytes(self) -> int | None:
        return self._held

    def cache_bytes(self, context: int) -> int | None:
        return None if self._cache_bytes is None else self._cache_bytes * context

    def close(self) -> None:
        self._opened.close()


def _stored(path: Path) -> tuple[int | None, int | None, str]:
    """Bytes of weights that a token reads, bytes of llama.cpp's cache a token, and the form of most weights."""
    if path.suffix != ".gguf":
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files) or None, None, path.suffix.lstrip(".") or "as stored"
    from plmtune.models.gguf_file import opened_gguf

    with opened_gguf(path) as file:
        looked_up = "token_embd.weight" if "output.weight" in file.tensors else ""
        read = sum(tensor.num_bytes for name, tensor in file.tensors.items() if name != looked_up)
        kinds = file.kinds()
        keys, architecture = file.metadata, file.metadata.get("general.architecture")

        def number(key: str, default: int = 0) -> int:
            value = keys.get(f"{architecture}.{key}", default)
            return value if isinstance(value, int) else default

        heads = number("attention.head_count")
        width = number("embedding_length") // max(heads, 1)
        widths = number("attention.key_length", width) + number("attention.value_length", width)
        # Keys and values of all heads in 16 bits, also of MLA.
        cache = 2 * number("block_count") * number("attention.head_count_kv", heads) * widths
    return read, cache or None, next(iter(kinds))


def _open(
    target: str,
    capacity: int,
    threads: int,
    dtype: str | None,
    sparse: Sparse,
    device: torch.device,
    flash_attention: bool | None,
) -> _Opened:
    kind = dtypes.from_name(dtype) if dtype else None
    if target.startswith("model=") and not Path(target).exists():
        return _Ours(_random_model(target, kind or torch.bfloat16, device), capacity, sparse, None)
    path = checkpoint_directory(target) if hub.parse(target) else hub.open_folder(Path(target))
    if path.is_file() and path.suffix not in (".gguf", ".pte"):
        raise UserError(f"{target} is neither a .gguf nor a .pte file, nor a checkpoint's directory.")
    if not path.exists():
        raise UserError(
            f"There is no {target} (seen from {Path.cwd()}). A config is measured with random weights as model=NAME, a "
            "model of the Hugging Face hub as OWNER/NAME."
        )
    if path.is_file() or _is_for_transformers(path):
        return _Served(path, capacity, threads, flash_attention)
    import plmtune

    model, tokenizer = plmtune.load(target, device, kind)
    # Real text, which is at hand everywhere: sparsity follows from what is read.
    text = Path(json.__file__).read_text(encoding="utf-8")[:4000]
    return _Ours(model, capacity, sparse, tokenizer.with_bos(tokenizer.encode(text)))


def _is_for_transformers(path: Path) -> bool:
    from plmtune.models.checkpoint_files import CONFIG, read_json

    if not (path / CONFIG).is_file():
        return False
    keys = read_json(path, CONFIG)
    return "plmtune" not in keys and keys.get("model_type") not in ("plm", "llama")


def _random_model(target: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model that a config describes, with weights as training begins with."""
    from plmtune.config import compose
    from plmtune.devices.sweep import vocabulary

    cfg = compose.compose("pretrain", (), [target])
    with torch.device("meta"):
        model: Decoder = compose.build("model", cfg.model, vocab_size=vocabulary(cfg))
    model = model.to(dtype).to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    model.requires_grad_(False).eval()
    prepack(model)  # as `plmtune.load` does
    return model


if __name__ == "__main__":
    # Where a tokenizer forks, it says so on each start.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
