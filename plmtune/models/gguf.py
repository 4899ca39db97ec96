"""Convert GGUF files, llama.cpp's format, to model directories: Llama's family and PLM.

Names and keys are those of the format's specification and of llama.cpp's converters. Anything unknown that would change
the model's numbers is refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.io import safetensors_writer
from plmtune.io.atomic import check_room
from plmtune.models.assemble import component_from_config
from plmtune.models.checkpoint_files import CONFIG, INDEX, write_json
from plmtune.models.directory import new_directory
from plmtune.models.gguf_file import GGUFFile, opened_gguf
from plmtune.models.gguf_layout import gguf_name, heads_of_halves, to_halves
from plmtune.models.gguf_tokenizer import read_tokenizer
from plmtune.models.hf_config import hf_config
from plmtune.models.hf_names import hf_name
from plmtune.modules.decoder import Decoder
from plmtune.tokenizers.tokenizer import Tokenizer

# Keys of an architecture that are read here, or that change nothing.
_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.kv_lora_rank",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
}
_MAX_POSITIONS = 2**24


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
        _check_parts(file)
        check_room(directory, sum(file.kinds().values()) * dtype.itemsize)
        model = _build(file)
        names = _check_tensors(model, file)
        notes = []
        if tokenizer is None:
            tokenizer = read_tokenizer(file, model.vocab_size)
            if tokenizer.adds_bos:
                notes.append(f"Each text begins with {tokenizer.bos}, in training, generation and evaluation.")
        elif tokenizer.num_tokens > model.vocab_size:
            raise UserError(f"The tokenizer has {tokenizer.num_tokens} tokens, {path} has {model.vocab_size} rows.")
        tokenizer.save(temporary)
        _write_weights(model, file, names, dtype, temporary)
        write_json(temporary / CONFIG, hf_config(model.config, dtype) | _ids(file, tokenizer))
        kinds = file.kinds()
        return Converted(sum(kinds.values()), kinds, tuple(notes))


def _check_parts(file: GGUFFile) -> None:
    """Refuse one part of a model that llama-gguf-split cut into several files."""
    number, count = (file.metadata.get(f"split.{name}") for name in ("no", "count"))
    if type(number) is int and type(count) is int and count > 1:
        raise UserError(
            f"{file.path} is part {number + 1} of {count} of a model. Join them with llama.cpp: "
            "llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf"
        )


def _ids(file: GGUFFile, tokenizer: Tokenizer) -> dict[str, Any]:
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    return {"bos_token_id": bos if isinstance(bos, int) else None, "eos_token_id": tokenizer.eos_id}


def _build(file: GGUFFile) -> Decoder:
    """The model of the metadata, on the meta device."""
    description = _model_config(file)
    try:
        with torch.device("meta"):
            model = component_from_config("model", description, str(file.path))(vocab_size=description["vocab_size"])
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"{file.path} describes no possible model: {str(error).splitlines()[0]}.") from error
    assert isinstance(model, Decoder)
    return model


def _model_config(file: GGUFFile) -> dict[str, Any]:
    metadata, path = file.metadata, file.path
    name = metadata.get("general.architecture")
    if name not in ("llama", "plm"):
        raise UserError(f"{path}: general.architecture is {name!r:.80}; only llama and plm can be read.")
    for key, value in metadata.items():
        setting = key.removeprefix(f"{name}.")
        if setting != key and setting not in _KEYS and value not in (0, "none", False):
            raise UserError(f"{path}: {key} is {value!r:.80}; what it changes in a {name} model is not supported.")

    def number(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{name}.{key}", default)
        if type(value) is not int or not 0 < value <= _MAX_POSITIONS:
            what = "is missing" if value is None else f"is {value!r:.80}, not a whole number above 0"
            raise UserError(f"{path}: {name}.{key} {what}.")
        return value

    def decimal(key: str, default: float) -> float:
        value = metadata.get(f"{name}.{key}", default)
        if not isinstance(value, float) or not math.isfinite(value):
            raise UserError(f"{path}: {name}.{key} is {value!r:.80}, not a number.")
        return float(str(np.float32(value)))  # 1e-5 as it was meant, not as fp32 has it

    layers, width, heads = number("block_count"), number("embedding_length"), number("attention.head_count")
    if layers > len(file.tensors):
        raise UserError(f"{path} names {layers} layers, but holds {len(file.tensors)} tensors.")
    if "rope_freqs.weight" in file.tensors:
        raise UserError(f"{path} holds rope_freqs.weight: RoPE scaling is not supported.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} misses the tensor token_embd.weight.")
    kv_heads = number("attention.head_count_kv", heads)
    attention: dict[str, Any]
    if name == "plm":
        key_length, turned = number("attention.key_length"), number("rope.dimension_count")
        if kv_heads != heads:
            raise UserError(f"{path}: {kv_heads} heads of keys and values for {heads} heads is no PLM model.")
        attention = {
            "component": "mla",
            "kv_lora_rank": number("attention.kv_lora_rank"),
            "qk_nope_head_dim": key_length - turned,
            "qk_rope_head_dim": turned,
            "v_head_dim": number("attention.value_length"),
            "rope_theta": decimal("rope.freq_base", 10000.0),
        }
    else:
        head_dim = number("attention.key_length", width // heads)
        if {number("attention.value_length", head_dim), number("rope.dimension_count", head_dim)} != {head_dim}:
            raise UserError(f"{path}: keys, values and RoPE of different widths are not supported in a llama model.")
        attention = {
            "component": "gqa",
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "rope_theta": decimal("rope.freq_base", 10000.0),
            "rope_interleaved": False,
            "bias": "blk.0.attn_q.bias" in file.tensors,
        }
    return {
        "component": name,
        "vocab_size": embedding.shape[0],
        "attention": attention,
        "ffn": {
            "component": "squared_relu" if name == "plm" else "swiglu",
            "hidden_dim": number("feed_forward_length"),
        },
        "norm": {"component": "rms_norm", "eps": decimal("attention.layer_norm_rms_epsilon", 1e-5)},
        "embed_dim": width,
        "num_layers": layers,
        "num_heads": heads,
        "max_seq_len": number("context_length"),
        "tie_embeddings": "output.weight" not in file.tensors,
    }


def _check_tensors(model: Decoder, file: GGUFFile) -> dict[str, str]:
    """{our name: the file's}, with every shape compared."""
    names = {name: gguf_name(name) for name in model.state_dict()}
    for name, tensor in model.state_dict().items():
        held = file.tensors.get(names[name])
        if held is None:
            raise UserError(f"{file.path} misses the tensor {names[name]}. Is the copy complete?")
        if held.shape != tuple(tensor.shape):
            raise UserError(
                f"{file.path}: {held.name} has shape {list(held.shape)}, its metadata need {list(tensor.shape)}."
            )
    extra = sorted(set(file.tensors) - set(names.values()))
    if extra:
        raise UserError(f"{file.path} holds the tensor {extra[0]!r:.80}, which a {model.config['component']} lacks.")
    return names


def _write_weights(
    model: Decoder, file: GGUFFile, names: Mapping[str, str], dtype: torch.dtype, directory: Path
) -> None:
    meta = model.state_dict()
    sizes = {hf_name(name): tensor.numel() * dtype.itemsize for name, tensor in meta.items()}
    ours = {hf_name(name): name for name in meta}
    dealt = safetensors_writer.deal(sizes, "model")
    for written, held in dealt.items():
        tensors = {name: _tensor(model, file, ours[name], names[ours[name]], dtype) for name in held}
        safetensors_writer.write(directory / written, tensors)
    if len(dealt) > 1:
        write_json(directory / INDEX, safetensors_writer.index(dealt, sizes))


def _tensor(model: Decoder, file: GGUFFile, name: str, theirs: str, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(file.read(theirs))
    heads = heads_of_halves(model.config, name)
    if heads is not None:
        tensor = to_halves(tensor, heads)
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        raise UserError(f"{file.path}: {theirs} does not fit into {dtype}. Use bf16 or fp32.")
    return cast
