"""Models and tokenizers out of GGUF files, llama.cpp's format: Llama's family and PLM.

Names and keys are those of the format's specification and of llama.cpp's converters. What would change the
model's numbers or the tokenizer's ids and is not known here is refused, never guessed.
"""

from __future__ import annotations

import json
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
from plmtune.models.hf_config import hf_config
from plmtune.models.hf_names import hf_name
from plmtune.modules.decoder import Decoder
from plmtune.modules.gqa import default_kv_heads
from plmtune.tokenizers import tokenizer_json, tokenizer_json_writer
from plmtune.tokenizers.bpe import DIGITS_GPT2_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, Normalization
from plmtune.tokenizers.tokenizer import Tokenizer

# Our names, and those of the format without ".weight".
_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "attention.kv_a_proj": "attn_kv_a_mqa",
    "attention.kv_a_norm": "attn_kv_a_norm",
    "attention.kv_b_proj": "attn_kv_b",
    "ffn.gate_proj": "ffn_gate",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}
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
# How a text is cut, by llama.cpp's name for it: pattern, normalization, and whether a token that is a whole
# piece is taken without looking at merges.
PRE_TOKENIZERS: dict[str, tuple[str, Normalization | None, bool]] = {
    "smollm": (DIGITS_GPT2_PATTERN, None, False),
    "starcoder": (DIGITS_GPT2_PATTERN, None, False),
    "qwen2": (QWEN2_PATTERN, "NFC", False),
    "llama-bpe": (LLAMA3_PATTERN, None, True),
    "llama3": (LLAMA3_PATTERN, None, True),
    "llama-v3": (LLAMA3_PATTERN, None, True),
    "smaug-bpe": (LLAMA3_PATTERN, None, False),
    "gpt-2": (GPT2_PATTERN, None, False),
}
# Of these llama.cpp puts bos before a text where the file does not say (tokenizer.ggml.add_bos_token).
_ADDS_BOS = ("llama-bpe", "llama3", "llama-v3")
# llama.cpp does not read a list without merges; this one of bytes that UTF-8 never uses does not act.
NO_MERGE = "ÿ ÿ"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)
_MAX_POSITIONS = 2**24


@dataclass(frozen=True)
class Converted:
    """What a conversion made.

    Attributes:
        num_parameters: numbers of the model.
        kinds: numbers in each form of the file, such as {"Q4_1": 106168320, "F32": 35136}.
        notes: what a person should know.
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
        UserError: if the file is damaged, holds what cannot be represented exactly, or the disk has no room for what
            it becomes; nothing is left then.
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
    """The model that the metadata describe, on the meta device."""
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


def gguf_name(name: str) -> str:
    """`layers.0.attention.q_proj.weight` -> `blk.0.attn_q.weight`."""
    parts = name.split(".")
    block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return block + _NAMES[".".join(parts[2:-1] if block else parts[:-1])] + f".{parts[-1]}"


def kv_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values that a model's `config` asks for."""
    heads, attention = config["num_heads"], config["attention"]
    if attention["component"] != "gqa":
        return int(heads)
    return int(attention["num_kv_heads"] or default_kv_heads(heads))


def heads_of_halves(config: Mapping[str, Any], name: str) -> int | None:
    """The heads of a tensor whose rows llama.cpp has in another order; None where the order is one.

    llama.cpp turns neighbours, so its converters put the pairs of a half-split RoPE side by side.
    """
    attention, part = config["attention"], name.split(".")[-2]
    if attention["component"] == "mla" or attention["rope_interleaved"]:
        return None
    return {"q_proj": config["num_heads"], "k_proj": kv_heads(config)}.get(part)


def to_neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows of tensor (Tensor), [heads x width, ...], whose pairs stand side by side, of those with halves."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def to_halves(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `to_neighbours`."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


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


def read_tokenizer(file: GGUFFile, rows: int) -> Tokenizer:
    """Return the tokenizer that a file's metadata hold.

    Args:
        rows: of the model's embedding.

    Raises:
        UserError: if it is none that can be represented with the same ids.
    """
    remedy = "Give another with --tokenizer."
    where, metadata = f"{file.path}, its tokenizer", file.metadata
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise UserError(f"{where}: model {model!r:.80} is not supported, only byte-level BPE (gpt2) is. {remedy}")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UserError(f"{where}: the pre-tokenizer {pre!r:.80} is not supported ({known} are). {remedy}")
    tokens, merges = _list(file, "tokens", str), _list(file, "merges", str)
    merges = [] if merges == [NO_MERGE] else merges
    kinds = _list(file, "token_type", int)
    if len(kinds) != len(tokens) or len(tokens) > rows:
        raise UserError(f"{where}: {len(tokens)} tokens, their types and the model's {rows} rows do not fit together.")
    if not set(kinds) <= {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise UserError(f"{where}: it holds tokens of types other than 1 to 5, so it is not byte-level. {remedy}")
    eos, bos_id = _special(file, "eos"), metadata.get("tokenizer.ggml.bos_token_id")
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token")
    adds_bos = pre in _ADDS_BOS and bos_id is not None if adds_bos is None else bool(adds_bos)
    bos = None
    if adds_bos or (type(bos_id) is int and 0 <= bos_id < len(kinds) and kinds[bos_id] in (_UNKNOWN, _CONTROL)):
        bos = _special(file, "bos")
        if bos == eos and not adds_bos:
            bos = None  # llama.cpp wants some token: files of tokenizers that have none (Qwen2's) name this one
    vocab: dict[str, int] = {}
    added = []
    for identity, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == _UNUSED:  # a padding row
            continue
        if token in vocab:
            raise UserError(f"{where}: {token!r:.80} has the ids {vocab[token]} and {identity}. {remedy}")
        vocab[token] = identity
        if kind != _NORMAL or token in (eos, bos):
            special = kind != _USER_DEFINED or token in (eos, bos)
            added.append(tokenizer_json_writer.added_token(identity, token, special=special))
    pattern, normalization, ignore_merges = PRE_TOKENIZERS[pre]
    data = tokenizer_json_writer.skeleton(pattern, normalization)
    data["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    data["added_tokens"] = added
    template = metadata.get("tokenizer.chat_template")
    try:
        # Through the file's own form, so that what a tokenizer.json may hold is what a GGUF may hold.
        vocabulary = tokenizer_json.parse(json.loads(json.dumps(data)), where)
        template = template if isinstance(template, str) else None
        ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
        return Tokenizer(
            vocabulary,
            eos=eos,
            vocab_size=rows,
            chat_template=template,
            bos=bos,
            adds_bos=adds_bos,
            ends=[identity for identity in ends if type(identity) is int and 0 <= identity < len(tokens)],
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error


def _list(file: GGUFFile, name: str, kind: type) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{name}")
    if isinstance(values, list) and all(type(value) is kind for value in values):
        return values
    raise UserError(f"{file.path}: tokenizer.ggml.{name} is missing or damaged. Give a tokenizer with --tokenizer.")


def _special(file: GGUFFile, name: str) -> str:
    """The text of the token that begins (bos) or ends (eos) a document."""
    key = f"tokenizer.ggml.{name}_token_id"
    identity, tokens = file.metadata.get(key), file.metadata.get("tokenizer.ggml.tokens")
    if type(identity) is not int or not isinstance(tokens, list) or not 0 <= identity < len(tokens):
        raise UserError(
            f"{file.path}: {key} is {identity!r:.80}, which is no token. Give a tokenizer with --tokenizer."
        )
    return str(tokens[identity])
