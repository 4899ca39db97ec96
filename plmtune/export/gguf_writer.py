"""GGUF files, llama.cpp's format: a model with its tokenizer and chat template in one file, and adapters for one.

Architectures, keys and the order of rows are those that `models.gguf` reads (`models.gguf_architectures`). Tensors are
converted one after the other, so that no model is in memory twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import (
    GGMLQuantizationType,
    GGUFType,
    GGUFValueType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    TokenType,
)
from gguf.quants import quantize
from torch import Tensor

from plmtune.errors import UserError
from plmtune.export.gguf_vocabulary import shown_name, vocabulary_keys
from plmtune.export.lint import WRITTEN, stored_bytes, stored_type
from plmtune.io.atomic import atomic_write, check_room
from plmtune.models.adapters import ADAPTERS, find_base, load_adapter, read_model_config
from plmtune.models.assemble import meta_model
from plmtune.models.checkpoint_files import ADAPTER_CONFIG, Stored, locate, model_name, read_json
from plmtune.models.gguf_forms import Form, with_factors
from plmtune.models.gguf_layout import to_neighbours
from plmtune.models.gguf_match import Match, match
from plmtune.models.gguf_squared_relu import KEY, Factors
from plmtune.models.hf_names import our_name
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import adapted, effective_weight
from plmtune.modules.quantized import Quantized, is_quantized
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.units import show_bytes

_CHUNK = 1 << 24  # numbers that are converted at a time
_MOST_FP16 = 65504.0
_PREFIX = "base_model.model."
_VALUES = {
    list: GGUFValueType.ARRAY,
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    TokenType: GGUFValueType.INT32,
    str: GGUFValueType.STRING,
}


@dataclass(frozen=True)
class _Part:
    """A tensor that is to be written.

    Attributes:
        name: the file's.
        shape: as torch has it.
        kind: how its numbers are stored.
        numbers: gives them.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    numbers: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return stored_bytes(self.kind, math.prod(self.shape))


def write_gguf(
    model: Decoder,
    tokenizer: Tokenizer,
    path: Path,
    *,
    kind: str,
    name: str | None = None,
    as_: Form | None = None,
) -> list[str]:
    """Write a model and its tokenizer as one GGUF file, in the place of one that is there; return notes for the user.

    Vectors stay F32. In the types of 4 and 5 bits the vocabulary's projection, tied or not, is Q8_0, where llama.cpp
    has Q6_K, which the gguf library does not write. Matrices whose rows are no multiple of 32 are F16 in all quantized
    types.

    Args:
        model: of quantized layers the numbers are written that their integers stand for.
        kind: one of `lint.WRITTEN`.
        name: what the file says that the model is called; None: the path's.
        as_: an architecture that is not the model's own, see `models.gguf_forms`.

    Raises:
        UserError: if the format has no such model or numbers, or the disk has no room.
        ValueError: if the model is prepacked or has adapters.
    """
    kind, config = kind.upper(), model.config
    assert kind in WRITTEN, kind
    found = _with_factors(match(config, as_), model)
    if hasattr(model, "score"):
        raise UserError("GGUF has no place for a score head: a reward model cannot be exported to it.")
    if tokenizer.num_tokens > model.vocab_size:
        raise UserError(f"The tokenizer has {tokenizer.num_tokens} tokens, the model {model.vocab_size} rows.")
    parts = list(_parts(model, kind, found))
    notes = []
    if found.architecture.layout.sinks:
        notes.append(
            "Of llama.cpp's architectures of this form granite_swa alone has windows, and RoPE in some layers. Older "
            "releases do not have it."
        )
    if found.architecture.layout.squared_relu is not None:
        copied = sum(part.num_bytes for part in parts if ".ffn_gate." in part.name)
        notes.append(
            f"{show_bytes(copied)} of {show_bytes(sum(part.num_bytes for part in parts))} are a second copy of each "
            f"layer's up projection, which {found.architecture.name} multiplies as the gate."
        )
    if is_quantized(model):
        notes.append("The integers of quantized layers are written as the numbers that they stand for.")
    odd = sorted({part.shape[-1] for part in parts if part.kind == "F16" and kind not in ("F16", "F32")})
    if odd:
        notes.append(f"Matrices with rows of {', '.join(map(str, odd))} numbers are F16: {kind} takes multiples of 32.")
    vocabulary, more = vocabulary_keys(tokenizer, model.vocab_size)
    shown = shown_name(name or path.stem, tokenizer)

    def write_metadata(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.MODEL)
        writer.add_name(shown)
        writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
        writer.add_quantization_version(2)
        _write_model_keys(writer, found)
        if (factors := found.architecture.layout.squared_relu) is not None:
            writer.add_key_value(KEY, factors.values, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
        for key, value in vocabulary.items():
            # Without the items' type the library searches the whole list for it.
            items = _VALUES[type(value[0])] if isinstance(value, list) else None
            writer.add_key_value(key, value, _VALUES[type(value)], items)

    _write(path, found.architecture.name, parts, write_metadata, header=64 * model.vocab_size)
    return notes + more


def write_gguf_adapter(directory: Path, path: Path, *, base: Path | None = None) -> list[str]:
    """Write LoRA adapters as a GGUF file that llama.cpp puts beside the base's; return notes for the user.

    Args:
        directory: what training saved, adapter_config.json and adapter_model.safetensors.
        base: directory of the weights that they stand beside; None: what they name.
    """
    remedy = f"Merge them: plmtune merge {directory} OUT, and export OUT."
    config = read_model_config(find_base(directory, base))
    architecture = match(config).architecture
    model = meta_model(config, f"{directory}, its base")
    load_adapter(model, directory)  # on the meta device: names, shapes and settings are checked
    layers = adapted(model)
    if any(hasattr(layer, "magnitude") or layer._quantize_base for layer in layers.values()):
        raise UserError(f"{directory}: GGUF has a form for LoRA alone, not for DoRA or a base of 4 bits. {remedy}")
    if hasattr(model, "score"):
        raise UserError(f"{directory}: GGUF has no place for a score head.")
    # llama.cpp's graph of plm multiplies by these matrices directly (ggml_mul_mat), without adapters.
    ignored = sorted({name.split(".")[-1] for name in layers} & {"q_proj", "kv_a_proj", "kv_b_proj"})
    if architecture.name == "plm" and ignored:
        raise UserError(
            f"{directory}: llama.cpp ignores adapters of {', '.join(ignored)} in the architecture plm. {remedy}"
        )
    tensors = Stored(locate(directory, ADAPTERS))
    settings = read_json(directory, ADAPTER_CONFIG)

    parts, layout = [], architecture.layout
    groups = layout.groups(model.state_dict())
    for name in tensors:
        layer, _, side = name.removesuffix(".weight").removeprefix(_PREFIX).rpartition(".")
        layer = our_name(f"{layer}.weight")
        (in_file, *more), alone = _holders(groups, layer)
        if more or not alone:
            raise UserError(
                f"{directory}: a GGUF file of {architecture.name} holds {layer} in another form ({in_file}), without "
                f"adapters of its own. {remedy}"
            )
        heads = layout.heads_of_halves(config, layer) if side == "lora_B" else None
        shape = tuple(tensors[name].shape)
        numbers = _in_order(partial(tensors.__getitem__, name), heads)
        parts.append(_Part(f"{in_file}.{side.lower()}", shape, "F32", numbers))

    def write_metadata(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(model_name(directory))
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))

    _write(path, architecture.name, parts, write_metadata)
    return [f"It stands beside a GGUF file of {settings.get('base_model_name_or_path')}, which is not in it."]


def _parts(model: Decoder, kind: str, found: Match) -> Iterator[_Part]:
    """All tensors of a model, in the order of its layers, and those that follow from its config."""
    head = "tok_embeddings.weight" if model.tied else "output.weight"
    held: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
    for owner, module in model.named_modules():
        if isinstance(module, Quantized):
            if module.prepacked:
                raise ValueError("a model that is prepacked for kernels cannot be exported: load it with prepare=False")
            held[f"{owner}.weight"] = (module.num_rows, module.width), module.dequantize
        if hasattr(module, "lora_a"):
            raise ValueError(f"{owner} has adapters: merge them first")
        for leaf, parameter in module.named_parameters(recurse=False):
            held[f"{owner}.{leaf}"] = tuple(parameter.shape), parameter.detach
    layout, config = found.architecture.layout, model.config
    shapes = layout.shapes(config, {name: torch.empty(shape, device="meta") for name, (shape, _) in held.items()})
    for name, ours in layout.groups(held).items():
        shape = shapes[name]
        stored = "F32" if len(shape) == 1 else stored_type(kind, shape[-1], head=head in ours)
        numbers = partial(layout.write, config, name, ours, lambda part: held[part][1]())
        yield _Part(name, shape, stored, numbers)
    for name, tensor in found.tensors.items():
        yield _Part(name, tuple(tensor.shape), "F32", tensor.clone)


def _with_factors(found: Match, model: Decoder) -> Match:
    """The same, with the factors of a squared ReLU that is stored as SwiGLU."""
    if found.architecture.layout.squared_relu is None:
        return found
    layers: list[Any] = list(model.layers)
    weights = ((effective_weight(layer.ffn.up_proj), layer.ffn_norm.weight) for layer in layers)
    with torch.no_grad():
        return replace(found, architecture=with_factors(found.architecture, Factors.choose(weights)))


def _write_model_keys(writer: GGUFWriter, found: Match) -> None:
    """The keys of the architecture: all, since llama.cpp's defaults for widths of heads are wrong for a PLM."""
    for key, value in found.keys.items():
        items = _VALUES[type(value[0])] if isinstance(value, list) else None
        writer.add_key_value(f"{found.architecture.name}.{key}", value, _VALUES[type(value)], items)


def _holders(groups: Mapping[str, tuple[str, ...]], ours: str) -> tuple[list[str], bool]:
    """The tensors of the file that hold one of ours, and whether they hold nothing else."""
    holders = [theirs for theirs, held in groups.items() if ours in held]
    return holders, all(len(groups[theirs]) == 1 for theirs in holders)


def _in_order(numbers: Callable[[], Tensor], heads: int | None) -> Callable[[], Tensor]:
    """The same with the rows as llama.cpp has them; see `heads_of_halves`."""
    return numbers if heads is None else lambda: to_neighbours(numbers(), heads)


def _write(
    path: Path,
    architecture: str,
    parts: Sequence[_Part],
    write_metadata: Callable[[GGUFWriter], None],
    *,
    header: int = 0,
) -> None:
    """Write a file, whole or not at all."""
    check_room(path, sum(part.num_bytes for part in parts) + header)
    with atomic_write(path, user_error=True) as temporary:
        writer = GGUFWriter(temporary, architecture)
        try:
            write_metadata(writer)
            for part in parts:
                kind = GGMLQuantizationType[part.kind]
                writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.num_bytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            (file,) = writer.fout
            writer.write_padding(file, file.tell())
            for part in parts:
                numbers = part.numbers()
                # The library's own function needs the whole tensor a second time in memory, as fp32.
                for rows in numbers.split(max(1, _CHUNK // math.prod(part.shape[1:]))):
                    _stored(rows, part, path).tofile(file)
                writer.write_padding(file, part.num_bytes)
        finally:
            writer.close()


def _stored(rows: Tensor, part: _Part, path: Path) -> npt.NDArray[Any]:
    """The bytes of some rows of a tensor."""
    numbers = rows.to("cpu", torch.float32).contiguous()
    if not numbers.isfinite().all():
        raise UserError(f"{part.name} holds numbers that are not finite: the model cannot be exported.")
    # The quantized types have scales in F16.
    if part.kind not in ("F32", "BF16") and numbers.abs().max() > _MOST_FP16:
        raise UserError(f"{path}: {part.name} holds numbers too large for {part.kind}. Use BF16 or F32.")
    return quantize(numbers.numpy(), GGMLQuantizationType[part.kind])
