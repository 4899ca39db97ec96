"""The models that `devices.measure` opens: PyTorch's and those that other runtimes serve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import plmtune
from plmtune import dtypes
from plmtune.config import compose
from plmtune.devices import sparse_decode
from plmtune.devices.latent_form import cached_numbers
from plmtune.devices.sweep import vocabulary
from plmtune.errors import UserError
from plmtune.export.runtimes import InferenceRuntime, open_runtime
from plmtune.export.runtimes.pytorch import PyTorchRuntime
from plmtune.inference.kernel_choice import prepack
from plmtune.io import hub
from plmtune.models.checkpoint_files import CONFIG, checkpoint_directory, read_json
from plmtune.models.families import by_model_type
from plmtune.models.gguf_file import opened_gguf
from plmtune.modules.attributes import with_attributes
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Quantized
from plmtune.quantization.schemes import EMBEDDING, POSITIONS, VALUES

Sparse = Literal["auto", "on", "off"]
SAMPLE = 256  # tokens of text that are read without a prompt, and repeated to fill the cache


@dataclass
class MeasuredModel:
    """A model that a runtime has opened.

    Attributes:
        weights, sparse: as in Measurement.
        bytes_read: of the weights that one token reads; None where the file does not say.
        bytes_cached: of the cache that one token reads for each in it.
    """

    opened: InferenceRuntime
    weights: str
    bytes_read: int | None
    bytes_cached: int | None
    sparse: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)

    def prompt(self, count: int) -> list[int]:
        ids: list[int] = torch.randint(self.opened.vocab_size, (count,), generator=self._random).tolist()
        return ids

    def timed(self, context: int, new_tokens: int, *, read_prompt: bool = True) -> tuple[float | None, float]:
        """Read that many tokens into an empty cache, then write some more.

        Returns: seconds to the first token, None where the cache was filled in another way, and of each later token.
        """
        found = self.opened.timed(self.prompt(context), new_tokens)
        return found.prompt, found.token

    def weight_bytes(self) -> int | None:
        return self.bytes_read


class PyTorchModel(MeasuredModel):
    """A decoder in PyTorch; its prompts repeat a sample, the tokens of a text or, for None, random ones."""

    opened: PyTorchRuntime

    def __init__(self, model: Decoder, capacity: int, sparse: Sparse, sample: Sequence[int] | None) -> None:
        opened = PyTorchRuntime(model, capacity)
        super().__init__(opened, _form(model), None, opened.cache.nbytes // opened.context)
        self._sample = list(sample) if sample else super().prompt(SAMPLE)
        able = len(sparse_decode.squared_relus(model))
        if able:
            if sparse == "auto":
                sparse_decode.choose(model, self._sample)
            elif sparse == "on":
                sparse_decode.switch(model, True)
            self.sparse = (sum(ffn.sparse for ffn in sparse_decode.squared_relus(model).values()), able)

    def prompt(self, count: int) -> list[int]:
        return (self._sample * -(-count // len(self._sample)))[:count]

    def timed(self, context: int, new_tokens: int, *, read_prompt: bool = True) -> tuple[float | None, float]:
        if read_prompt:
            return super().timed(context, new_tokens)
        self.fill(context)
        return None, self.opened.timed_steps(new_tokens)

    @torch.inference_mode()
    def fill(self, context: int) -> None:
        """Fill the cache with repetitions of the sample, so that sparsity is that of text."""
        read = min(context, SAMPLE)
        self.opened.start(self.prompt(read))
        for layer in self.opened.cache.layers:
            for buffer in layer:
                for begin in range(read, context, read):
                    buffer[:, :, begin : min(begin + read, context)] = buffer[:, :, : min(read, context - begin)]
        self.opened.cache.length = context

    @torch.inference_mode()
    def weight_bytes(self) -> int:
        total = 0
        model = self.opened.model
        for name, module in model.named_modules():
            if (name == EMBEDDING and not model.tied) or name in POSITIONS or name.startswith(VALUES):
                continue  # one row of it is looked up
            if isinstance(module, Quantized):
                held = module.dense
                total += module.format.num_bytes((module.num_rows, module.width)) if held is None else held.nbytes
            total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        # Less what a token skips of `down`; one is decoded in the place of the last one.
        skipping = [ffn for ffn in sparse_decode.squared_relus(model).values() if ffn.sparse]
        self.opened.cache.truncate(self.opened.cache.length - 1)
        with with_attributes(skipping, record_sparsity=True):
            self.opened.step(self.opened.newest)
        shares = [(ffn.sparsity, ffn.down_proj.weight.nbytes) for ffn in skipping]
        return total - sum(int(share.mean() * size) for share, size in shares if share is not None)


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


def _stored(path: Path) -> tuple[int | None, int | None, str]:
    """Bytes of weights that a token reads, bytes a token of llama.cpp's cache, and the format of most weights."""
    if path.suffix != ".gguf":
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files) or None, None, path.suffix.lstrip(".") or "as stored"

    with opened_gguf(path) as file:
        looked_up = "token_embd.weight" if "output.weight" in file.tensors else ""
        read = sum(tensor.num_bytes for name, tensor in file.tensors.items() if name != looked_up)
        kinds = file.kinds()
        cache = 2 * cached_numbers(file)  # in 16 bits
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
        opened = open_runtime(path, threads=threads, context=capacity, flash_attention=flash_attention)
        weight_bytes, cache_bytes, weights = _stored(path)
        if flash_attention is not None:
            weights += f", flash attention {'on' if flash_attention else 'off'}"
        return MeasuredModel(opened, weights, weight_bytes, cache_bytes)

    model, tokenizer = plmtune.load(target, device, kind)
    # Real text that exists everywhere, because sparsity depends on it.
    text = Path(json.__file__).read_text(encoding="utf-8")[:4000]
    return PyTorchModel(model, capacity, sparse, tokenizer.with_bos(tokenizer.encode(text)))


def _is_for_transformers(path: Path) -> bool:
    if not (path / CONFIG).is_file():
        return False
    keys = read_json(path, CONFIG)
    return "plmtune" not in keys and keys.get("model_type") not in by_model_type()


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
