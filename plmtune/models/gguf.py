"""Convert GGUF files, llama.cpp's format, to model directories.

Names and keys are those of the format's specification and of llama.cpp's converters. Anything unknown that would change
the model's numbers is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.io import safetensors_writer
from plmtune.io.atomic import check_room
from plmtune.models.checkpoint_files import CONFIG, INDEX, write_json
from plmtune.models.directory import new_directory
from plmtune.models.families import names_of
from plmtune.models.gguf_architectures import BY_NAME, Architecture
from plmtune.models.gguf_file import GGUFFile, opened_gguf
from plmtune.models.gguf_forms import architecture_of
from plmtune.models.gguf_keys import Metadata
from plmtune.models.gguf_layout import Layout
from plmtune.models.gguf_match import build
from plmtune.models.gguf_squared_relu import KEY, is_copy
from plmtune.models.gguf_tokenizer import read_tokenizer
from plmtune.models.hf import hf_state
from plmtune.models.hf_config import hf_config
from plmtune.models.hf_names import Names
from plmtune.modules.decoder import Decoder
from plmtune.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        num_parameters: numbers of the model.
        kinds: numbers of each type of the file, such as {"Q4_1": 106168320, "F32": 35136}.
        notes: for the user, a sentence each.
    """

    num_parameters: int
    kinds: dict[str, int]
    notes: tuple[str, ...]


def convert(
    path: Path,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write the model of a GGUF file as a model directory, dequantized, with its tokenizer and chat template.

    One file of at most 1 GiB is in memory at a time.

    Args:
        dtype: of the weights that are written.
        tokenizer: None: the file's own.
        overwrite: replace a model that is there.

    Raises:
        UserError: if the file is damaged, cannot be represented exactly, or the disk has no room; nothing is left
            then.
    """
    with opened_gguf(path) as file, new_directory(directory, overwrite=overwrite) as temporary:
        check_room(directory, sum(file.kinds().values()) * dtype.itemsize)
        model, architecture = _build(file)
        groups = _check_tensors(model, file, architecture.layout)
        notes = []
        if tokenizer is None:
            tokenizer = read_tokenizer(file, model.vocab_size)
            if tokenizer.adds_bos:
                notes.append(f"Each text begins with {tokenizer.bos}, in training, generation and evaluation.")
            if file.metadata.get("tokenizer.ggml.add_eos_token") is True:
                notes.append(
                    f"llama.cpp puts {tokenizer.eos} behind each text (tokenizer.ggml.add_eos_token), also behind a "
                    "prompt; plmtune puts it between texts of training alone."
                )
        elif tokenizer.num_tokens > model.vocab_size:
            raise UserError(f"The tokenizer has {tokenizer.num_tokens} tokens, {path} has {model.vocab_size} rows.")
        tokenizer.save(temporary)
        keys = hf_config(model.config, dtype)
        _write_weights(model, file, architecture.layout, groups, names_of(keys), dtype, temporary)
        write_json(temporary / CONFIG, keys | _ids(file, tokenizer))
        kinds = file.kinds()
        return Converted(sum(kinds.values()), kinds, tuple(notes))


def _ids(file: GGUFFile, tokenizer: Tokenizer) -> dict[str, Any]:
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    return {"bos_token_id": bos if isinstance(bos, int) else None, "eos_token_id": tokenizer.eos_id}


def _build(file: GGUFFile) -> tuple[Decoder, Architecture]:
    """The model of the metadata, on the meta device, and how the file holds it."""
    path, name = file.path, file.metadata.get("general.architecture")
    architecture = architecture_of(file.metadata, path)
    if architecture is None:
        raise UserError(f"{path}: general.architecture is {name!r:.80}; plmtune reads {', '.join(BY_NAME)}.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} misses the tensor token_embd.weight: it holds no language model.")
    shapes = {tensor: held.shape for tensor, held in file.tensors.items()}
    keys = Metadata(path, architecture.name, file.metadata, shapes, lambda tensor: torch.from_numpy(file.read(tensor)))
    layers = keys.number("block_count")
    if layers > len(file.tensors):
        raise UserError(f"{path} names {layers} layers, but holds {len(file.tensors)} tensors.")
    settings = architecture.read(keys)
    keys.refuse_rest()
    described = {"component": architecture.component, "vocab_size": embedding.shape[0]} | settings
    return build(described, str(path)), architecture


def _check_tensors(model: Decoder, file: GGUFFile, layout: Layout) -> dict[str, tuple[str, ...]]:
    """{the file's name: our names of what it holds}, with every shape compared."""
    state = model.state_dict()
    name = file.metadata["general.architecture"]
    for theirs, shape in layout.shapes(model.config, state).items():
        held = file.tensors.get(theirs)
        if held is None:
            raise UserError(
                f"{file.path} misses the tensor {theirs} of a {name} model of {model.config['num_layers']} layers."
            )
        if held.shape != shape:
            raise UserError(f"{file.path}: {held.name} has shape {list(held.shape)}, its metadata need {list(shape)}.")
    groups = layout.groups(state)
    extra = sorted(filter(layout.is_ours, set(file.tensors) - set(groups)))
    if extra:
        raise UserError(f"{file.path} holds the tensor {extra[0]!r:.80}, which a {name} model lacks.")
    return groups


def _write_weights(
    model: Decoder, file: GGUFFile, layout: Layout, groups: Mapping[str, tuple[str, ...]],
    names: Names, dtype: torch.dtype,
    directory: Path,
) -> None:  # fmt: skip
    meta = model.state_dict()
    ours = names.groups(meta)
    sizes = {theirs: sum(meta[name].numel() for name in held) * dtype.itemsize for theirs, held in ours.items()}
    rows = {name: len(tensor) for name, tensor in meta.items()}
    copies = layout.copies(groups)

    def read(name: str) -> Tensor:
        found = layout.read(model.config, name, groups, rows, lambda theirs: torch.from_numpy(file.read(theirs)))
        if name in copies:
            copy = layout.without_factor(copies[name], lambda theirs: torch.from_numpy(file.read(theirs)))
            first = next(theirs for theirs, held in groups.items() if name in held)
            if not is_copy(copy, found, (file.tensors[first].kind.name, file.tensors[copies[name]].kind.name)):
                raise UserError(
                    f"{file.path}: {copies[name]} is not the copy of {first} that the key {KEY} says it is, so the "
                    "file holds no squared ReLU. Was it changed after the export?"
                )
        cast = found.to(dtype)
        if not torch.isfinite(cast).all():
            theirs = next(theirs for theirs, held in groups.items() if name in held)
            raise UserError(f"{file.path}: {theirs} does not fit into {dtype}. Use bf16 or fp32.")
        return cast

    dealt = safetensors_writer.deal(sizes, "model")
    for written, held in dealt.items():
        state: dict[str, Tensor] = {}
        for theirs in held:
            state |= hf_state({name: read(name) for name in ours[theirs]}, names)
        safetensors_writer.write(directory / written, state)
    if len(dealt) > 1:
        write_json(directory / INDEX, safetensors_writer.index(dealt, sizes))
