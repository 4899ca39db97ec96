"""The models that `devices.measure` opens: PyTorch's and those that other runtimes serve."""

from __future__ import annotations

import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import plmtune
from plmtune import dtypes
from plmtune.config import compose
from plmtune.devices import sparse_decode
from plmtune.devices.sweep import vocabulary
from plmtune.errors import UserError
from plmtune.inference.kernel_choice import prepack
from plmtune.io import hub
from plmtune.models.checkpoint_files import CONFIG, checkpoint_directory, read_json
from plmtune.models.gguf_file import opened_gguf
from plmtune.modules.attributes import with_attributes
from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SquaredReLU
from plmtune.modules.quantized import Quantized

Sparse = Literal["auto", "on", "off"]
SAMPLE = 256  # tokens of text that are read without a prompt, and repeated to fill the cache


class MeasuredModel(ABC):
    """A model that is measured.

    Attributes:
        runtime, weights, sparse: as in Measurement.
        longest: tokens that its cache holds.
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
        """Free its memory."""


class PyTorchModel(MeasuredModel):
    """A decoder in PyTorch.

    Args:
        sample: tokens of a text, repeated to the length of a prompt; None: random ones.
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
        """Fill the cache with repetitions of the sample, so that sparsity is that of text."""
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
                continue  # one row of it is looked up
            if isinstance(module, Quantized):
                held = module.dense
                total += module.format.num_bytes((module.num_rows, module.width)) if held is None else held.nbytes
            total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        return total - self._skipped()

    def _skipped(self) -> int:
        """Bytes of `down` that a token skips; a token is decoded in the place of the last one."""
        skipping = [ffn for ffn in sparse_decode.squared_relus(self.model).values() if ffn.sparse]
        self.cache.truncate(self.cache.length - 1)
        with with_attributes(skipping, record_sparsity=True):
            self.model(self._next, cache=self.cache, hidden=True)
        return sum(_zeros(ffn) for ffn in skipping)

    def cache_bytes(self, context: int) -> int:
        return self.cache.nbytes // self.cache.max_seq_len * context

    def close(self) -> None:
        del self.model, self.cache


def _zeros(ffn: SquaredReLU) -> int:
    assert ffn.sparsity is not None
    return int(float(ffn.sparsity.mean()) * ffn.down_proj.weight.nbytes)


def _form(model: Decoder) -> str:
    """The format of most of a model's numbers."""
    sizes: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, Quantized):
            name = module.format.name
            sizes[name] = sizes.get(name, 0) + module.num_rows * module.width
        else:
            for parameter in module.parameters(recurse=False):
                name = dtypes.dtype_name(parameter.dtype)
                sizes[name] = sizes.get(name, 0) + parameter.numel()
    return max(sizes, key=lambda name: sizes[name])


class ServedModel(MeasuredModel):
    """A file that an exported model's runtime runs."""

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
    """Bytes of weights that a token reads, bytes a token of llama.cpp's cache, and the format of most weights."""
    if path.suffix != ".gguf":
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files) or None, None, path.suffix.lstrip(".") or "as stored"

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


def open_model(
    target: str,
    capacity: int,
    threads: int,
    dtype: str | None,
    sparse: Sparse,
    device: torch.device,
    flash_attention: bool | None,
) -> MeasuredModel:
    kind = dtypes.from_name(dtype) if dtype else None
    if target.startswith("model=") and not Path(target).exists():
        return PyTorchModel(_random_model(target, kind or torch.bfloat16, device), capacity, sparse, None)
    path = checkpoint_directory(target) if hub.parse(target) else hub.newest_snapshot(Path(target))
    if path.is_file() and path.suffix not in (".gguf", ".pte"):
        raise UserError(f"{target} is neither a .gguf nor a .pte file, nor a checkpoint's directory.")
    if not path.exists():
        raise UserError(
            f"There is no {target} (seen from {Path.cwd()}). A config is measured with random weights as model=NAME, a "
            "model of the Hugging Face hub as OWNER/NAME."
        )
    if path.is_file() or _is_for_transformers(path):
        return ServedModel(path, capacity, threads, flash_attention)

    model, tokenizer = plmtune.load(target, device, kind)
    # Real text that exists everywhere, because sparsity depends on it.
    text = Path(json.__file__).read_text(encoding="utf-8")[:4000]
    return PyTorchModel(model, capacity, sparse, tokenizer.with_bos(tokenizer.encode(text)))


def _is_for_transformers(path: Path) -> bool:

    if not (path / CONFIG).is_file():
        return False
    keys = read_json(path, CONFIG)
    return "plmtune" not in keys and keys.get("model_type") not in ("plm", "llama")


def _random_model(target: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model that a config describes, with the weights that training begins with."""

    cfg = compose.compose("pretrain", (), [target])
    with torch.device("meta"):
        model: Decoder = compose.build("model", cfg.model, vocab_size=vocabulary(cfg))
    model = model.to(dtype).to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    model.requires_grad_(False).eval()
    prepack(model)  # as `plmtune.load` does
    return model
