"""What an export says about itself, in this project's words, so that it can be laid beside the checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from gguf import LlamaFileType, TokenType
from torch import Tensor

from plmtune.errors import UserError
from plmtune.export.huggingface import GATE
from plmtune.export.runtimes import form_of
from plmtune.models import gguf_file
from plmtune.models.assemble import meta_model
from plmtune.models.checkpoint_files import CONFIG, Stored, checkpoint_directory, locate, opened_weights, read_json
from plmtune.models.families import names_of
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gguf_forms import architecture_of
from plmtune.models.gguf_match import match
from plmtune.models.gguf_rope import FREQS, LONG
from plmtune.models.hf_config import described_model, hf_config, read_formats
from plmtune.models.hf_names import hf_name
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, Quantized
from plmtune.tokenizers.jieba_sentencepiece import JiebaPieces
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import load_tokenizer

T = TypeVar("T")

# What llama.cpp and transformers take where a file has none.
_DEFAULT_THETA = 10000.0
_EMBEDDING = "tok_embeddings.weight"
# The token that ends a text for llama.cpp where a file of this tokenizer names none.
_DEFAULT_EOS = {"gpt2": 11}


@dataclass(frozen=True)
class Piece:
    """A tensor of a GGUF file that holds one of ours in another form: in part, transposed or times a factor.

    Attributes:
        name: ours.
        theirs: the file's.
        kind: how its numbers are written.
        held: gives them.
        written: gives what the file should hold, from what gives one of our tensors.
    """

    name: str
    theirs: str
    kind: str
    held: Callable[[], Tensor]
    written: Callable[[Callable[[str], Tensor]], Tensor]


@dataclass(frozen=True)
class Contents:
    """What a file or directory holds.

    Attributes:
        kind: how most of its matrices' numbers are written, such as F32, Q4_K, int8.
        settings: what changes a model's numbers: our key -> value.
        tensors: our name -> the numbers it stands for, fp32, in our layout, read when asked for; empty where the file
            cannot be read that way.
        kinds: our name -> how that tensor's numbers are written, where it is not `kind`.
        declared: the type that the file says it is of, such as Q4_K_M; None: it does not say.
        missing, unknown: tensors of the checkpoint that it lacks, and those that it has and the checkpoint has not, by
            its own names.
        rows: of the embedding; None: not known.
        tokenizer: tokens and merges, as far as they are known.
        ordinary: of each token whether a GGUF file says that it is text like any other, not special; empty: not known.
        pre: llama.cpp's name for how text is cut; None: the file does not say.
        template: of conversations; None: none, or not known.
        ends: the id that the file says ends a text; None: it does not say.
        ends_turn: the id that it says ends a turn; None: it does not say.
        computation: what its config.json describes, as `Decoder.computation` says it; empty: not known.
        architecture: of a GGUF file.
        pieces: of our tensors that a GGUF file holds in another form.
    """

    kind: str
    settings: dict[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    declared: str | None = None
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    rows: int | None = None
    tokenizer: dict[str, list[str]] = field(default_factory=dict)
    ordinary: tuple[bool, ...] = ()
    pre: str | None = None
    template: str | None = None
    ends: int | None = None
    ends_turn: int | None = None
    computation: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    pieces: tuple[Piece, ...] = ()


def read_contents(path: Path, model: Decoder) -> Contents:
    """Read what is known of an export.

    Args:
        path: a .gguf, a .pte, or a directory in Hugging Face's form.
        model: what it was made from: whose names and layout the tensors are given in.
    """
    form = form_of(path) if path.is_file() else ""
    if form == ".gguf":
        return _of_gguf(path, model)
    if form == ".pte":
        from plmtune.export.runtimes.executorch import read_facts

        rows, _, formats = read_facts(path)
        return Contents("F32" if formats == ["fp32"] else _coarsest(formats), rows=rows)
    return _of_directory(checkpoint_directory(path), model)


def settings_of(model: Decoder) -> dict[str, float]:
    """What changes a model's numbers beside its tensors: our key -> value."""
    return _of_keys(hf_config(model.config, torch.float32))


def tokenizer_tables(tokenizer: Tokenizer) -> dict[str, list[str]]:
    """A tokenizer's tokens by id (empty where it has none) and merges, as a GGUF file has them."""
    if isinstance(tokenizer.vocabulary, JiebaPieces):
        return {"tokens": tokenizer.vocabulary.texts, "merges": []}
    held = json.loads(tokenizer.as_json)["model"]
    tokens = [""] * tokenizer.vocab_size
    if isinstance(held["vocab"], list):  # Unigram: tokens with their scores
        held["vocab"] = {token: identity for identity, (token, _) in enumerate(held["vocab"])}
    for token, identity in (held["vocab"] | tokenizer.vocabulary.added | tokenizer.vocabulary.specials).items():
        tokens[identity] = token
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in held.get("merges", [])]
    return {"tokens": tokens, "merges": merges}


_BITS = re.compile(r"(?:IQ|TQ|Q|(?:int8_dynamic_)?int)(\d)(?:_\w+)?")
_SCALING = "attention.rope_scaling"  # a factor of positions; our models have none
# Our key: Hugging Face's, and GGUF's without the architecture.
_KEYS = {
    "norm.eps": ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    "attention.rope_theta": ("rope_theta", "rope.freq_base"),
    "num_layers": ("num_hidden_layers", "block_count"),
    "num_heads": ("num_attention_heads", "attention.head_count"),
    "attention.num_kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "attention.kv_lora_rank": ("kv_lora_rank", "attention.kv_lora_rank"),
    "attention.qk_rope_head_dim": ("qk_rope_head_dim", "rope.dimension_count"),
    "attention.v_head_dim": ("v_head_dim", "attention.value_length"),
    "attention.head_dim": ("head_dim", "attention.key_length"),
    "embed_dim": ("hidden_size", "embedding_length"),
    "ffn.hidden_dim": ("intermediate_size", "feed_forward_length"),
    "max_seq_len": ("max_position_embeddings", "context_length"),
}


def _of_keys(keys: Mapping[str, Any]) -> dict[str, float]:
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    keys = {**keys, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    if "qk_nope_head_dim" in keys and "qk_rope_head_dim" in keys:
        keys["head_dim"] = keys["qk_nope_head_dim"] + keys["qk_rope_head_dim"]
    return _settings({ours: keys.get(theirs) for ours, (theirs, _) in _KEYS.items()}, rope.get("factor"))


def _settings(values: Mapping[str, Any], scaling: Any) -> dict[str, float]:
    """Those of the values that are numbers, and the factor of positions, which is 1 where there is none."""
    values = {**values, _SCALING: scaling or 1.0}
    return {key: float(value) for key, value in values.items() if type(value) in (int, float)}


def differing(held: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """{our key: (the export's value, the checkpoint's)} where they are not the same number in fp32."""
    return {
        key: (held[key], wanted[key])
        for key in wanted
        if key in held and not math.isclose(held[key], wanted[key], rel_tol=1e-6)
    }


def differing_parts(held: Mapping[str, Any], model: Decoder) -> list[str]:
    """What an export's `computation` has otherwise than the model, a sentence's part each; none where it is empty."""
    if not held:
        return []
    wanted, found = _flat(meta_model(model.config, "the model").computation()), _flat(held)
    names = [name for name in dict.fromkeys((*wanted, *found)) if found.get(name) != wanted.get(name)]
    return [f"{name} is {found.get(name)} in the export, {wanted.get(name)} here" for name in names]


def _flat(computation: Mapping[str, Any]) -> dict[str, Any]:
    """{module.setting: value}; shapes are those of tensors, and compared as such."""
    found: dict[str, Any] = {}
    for name, (kind, settings, rope, _) in computation.items():
        held = settings | {"class": kind.__name__, "rope": rope}
        found |= {f"{name}.{key}".removeprefix("."): value for key, value in held.items() if key != "init_std"}
    return found


def bits_of(kind: str) -> int | None:
    """Bits of a number of some kind of integers (Q4_K: 4, int8_dynamic_int4_g32: 4); None: it is none that is known."""
    found = _BITS.fullmatch(kind)
    return int(found[1]) if found else None


class _Lazy(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for."""

    def __init__(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _names(model: Decoder) -> list[str]:
    """Our names of a model's tensors; of a quantized layer its weight alone."""
    return [name for name in model.state_dict() if name.endswith((".weight", ".bias"))]


def _of_gguf(path: Path, model: Decoder) -> Contents:
    with opened_gguf(path) as file:
        metadata, held = file.metadata, file.tensors
    architecture = architecture_of(metadata, path)
    name = metadata.get("general.architecture")

    def said(key: str, kind: type[T], default: Any = None) -> T | None:
        value = metadata.get(f"tokenizer.{key}", default)
        return value if type(value) is kind else None

    def stored(theirs: str) -> Tensor:
        return torch.from_numpy(file.read(theirs))

    def written(theirs: str, weight: Callable[[str], Tensor]) -> Tensor:
        return layout.write(model.config, theirs, groups[theirs], weight)

    def read(ours: str) -> Tensor:
        found = layout.read(model.config, ours, groups, rows, stored)
        if layout.unit_offset and ours.endswith("norm.weight"):
            own = state[ours].float()
            found = torch.where(own + 1 - 1 == found, own, found)  # stored as 1 + weight, which rounds
        return found

    scaled = metadata.get(f"{name}.rope.scaling.factor", metadata.get(f"{name}.rope.scale_linear"))
    settings = _settings(
        {ours: metadata.get(f"{name}.{theirs}") for ours, (_, theirs) in _KEYS.items()},
        None if metadata.get(f"{name}.rope.scaling.type") == "none" else scaled,
    )
    if FREQS in held or LONG in held:
        settings.pop(_SCALING)  # divisors of frequencies, which no factor says
    if f"{name}.attention.key_length_mla" in metadata:  # the cache holds the latent, of one head
        lengths = {"attention.head_dim": "key_length_mla", "attention.v_head_dim": "value_length_mla"}
        settings |= _settings({key: metadata.get(f"{name}.attention.{part}") for key, part in lengths.items()}, scaled)
        settings.pop("attention.num_kv_heads", None)
    ours_there = _names(model)
    if "output.weight" in held and "output.weight" not in ours_there:
        ours_there.append("output.weight")
    layout = (architecture or match(model.config).architecture).layout
    groups = layout.groups(ours_there)
    state = model.state_dict()
    rows = {ours: len(tensor) for ours, tensor in state.items()}
    names = {ours: [theirs for theirs, parts in groups.items() if ours in parts] for ours in ours_there}
    there = [ours for ours, theirs in names.items() if all(part in held for part in theirs)]
    tables = {key: table for key in ("merges", "tokens") if (table := said(f"ggml.{key}", list)) is not None}
    embedding = held.get("token_embd.weight")
    return Contents(
        kind=next(iter(file.kinds()), "F32"),
        settings={"attention.rope_theta": _DEFAULT_THETA} | settings,
        tensors=_Lazy(there, read),
        kinds={ours: min((held[part].kind.name for part in names[ours]), key=gguf_file.bits_of) for ours in there},
        declared=_declared(metadata.get("general.file_type")),
        missing=tuple(sorted(set(groups) - set(held))),
        unknown=tuple(sorted(filter(layout.is_ours, set(held) - set(groups)))),
        rows=embedding.shape[0] if embedding is not None else None,
        tokenizer=tables,
        ordinary=tuple(kind in (TokenType.NORMAL, TokenType.BYTE) for kind in said("ggml.token_type", list) or ()),
        pre=said("ggml.pre", str),
        template=said("chat_template", str),
        ends=said("ggml.eos_token_id", int, _DEFAULT_EOS.get(str(said("ggml.model", str)))),
        ends_turn=said("ggml.eot_token_id", int),
        architecture=name if isinstance(name, str) else None,
        pieces=tuple(
            Piece(ours, theirs, held[theirs].kind.name, partial(stored, theirs), partial(written, theirs))
            for ours in there
            for theirs in names[ours]
            if len(names[ours]) > 1 or layout.factor(theirs) != 1
        ),
    )


def _declared(file_type: Any) -> str | None:
    """The name of a GGUF file's type: 15 is Q4_K_M."""
    try:
        return LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_").replace("GUESSED", "") or None
    except ValueError:
        return None


def _of_directory(directory: Path, model: Decoder) -> Contents:
    keys = read_json(directory, CONFIG)
    quantization = keys.get("quantization_config")
    ours_quantized = isinstance(quantization, dict) and quantization.get("formats")
    formats = read_formats(directory)[0] if ours_quantized else {}
    locations = locate(directory)
    stored, state = Stored(locations), model.state_dict()
    form = names_of(keys)
    parts = form.groups(_names(model))
    names = {ours: theirs for theirs, held in parts.items() for ours in held}
    names.setdefault("output.weight", "lm_head.weight")  # a tied head may be stored, too
    there = [ours for ours, theirs in names.items() if theirs in locations]
    # A PLM in this form has up in its gate, times a factor: see export.huggingface.
    deepseek = keys.get("model_type") == "deepseek_v3" and model.config["ffn"]["component"] == "squared_relu"
    factor = GATE if deepseek and keys.get("hidden_act") != "relu" else 1.0
    settings, computation = _of_keys(keys), {}
    if deepseek:
        settings.pop("attention.head_dim", None)  # of RoPE alone there
    else:
        with contextlib.suppress(UserError):  # one that only transformers can read
            found = described_model(keys, directory / CONFIG)
            settings, computation = settings_of(found), found.computation()
    if keys.get("model_type") != "plm" and not computation:
        settings.setdefault("attention.rope_theta", _DEFAULT_THETA)
    tables, template = {}, None
    with contextlib.suppress(UserError):  # one that only transformers can read is not looked into
        tokenizer = load_tokenizer(directory)
        tables, template = tokenizer_tables(tokenizer), tokenizer.chat_template

    def read(ours: str) -> Tensor:
        theirs = names[ours]
        found = _stored_tensor(stored, theirs, formats.get(ours.removesuffix(".weight")))
        found = found.t() if form.is_transposed(theirs) else found
        rows = [len(state[part]) for part in parts.get(theirs, ())]
        if len(rows) > 1 and sum(rows) == len(found):
            found = found.split(rows)[parts[theirs].index(ours)]
        return found * factor if ours.endswith("up_proj.weight") else found

    def header(ours: str) -> tuple[str, list[int]]:
        with opened_weights(locations[names[ours]]) as opened:
            held = opened.get_slice(names[ours])
            return held.get_dtype(), held.get_shape()

    def kind(ours: str) -> str:
        format = formats.get(ours.removesuffix(".weight"))
        return header(ours)[0] if format is None else format.name

    kinds = {ours: kind(ours) for ours in there}
    known = {*names.values(), "lm_head.weight"}
    known |= {f"{hf_name(name)}.{leaf}" for name in formats for leaf in ("scales", "zeros")}
    known |= {name.replace("up_proj", "gate_proj") for name in names.values()} if deepseek else set()
    most = kinds.get(_EMBEDDING, next(iter(kinds.values()), "F32"))
    return Contents(
        kind=_coarsest([format.name for format in formats.values()]) if formats else most,
        settings=settings,
        tensors=_Lazy(there, read),
        kinds=kinds,
        missing=tuple(sorted(names[ours] for ours in _names(model) if ours not in there)),
        # Older files carry RoPE's table.
        unknown=tuple(sorted(name for name in set(locations) - known if not name.endswith(form.buffers))),
        rows=header(_EMBEDDING)[1][0] if _EMBEDDING in there else None,
        tokenizer=tables,
        template=template,
        computation=computation,
    )


def _stored_tensor(stored: Stored, name: str, format: Format | None) -> Tensor:
    """The numbers of a tensor under Hugging Face's name, which may be held as integers."""
    held = stored[name]
    if format is None:
        return held.float()
    stem, rows = name.removesuffix("weight"), len(held)
    with torch.device("meta"):
        quantized = Quantized(rows, held.shape[1] * (1 if format.bits == 8 else 2), format)
    quantized.weight, quantized.scales = held, stored[f"{stem}scales"].float()
    if not format.symmetric:
        quantized.zeros = stored[f"{stem}zeros"]
    return quantized.dequantize()


def _coarsest(formats: list[str]) -> str:
    return min(formats, key=lambda name: ("int4" not in name, "dynamic" not in name, name))
