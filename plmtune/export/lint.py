"""What a model's parts and sizes mean for each format, known from its config before anything is written.

`refused`: the format has no such model. `warning`: it works, at a cost that the sentence names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from plmtune.errors import UserError
from plmtune.models.assemble import component_config, meta_model
from plmtune.models.families import by_model_type
from plmtune.models.gguf_forms import Form
from plmtune.models.gguf_layout import kv_heads
from plmtune.models.gguf_match import match
from plmtune.models.hf_config import hf_config
from plmtune.quantization.schemes import candidates
from plmtune.registry import Component, keys_of
from plmtune.units import show_bytes

Target = Literal["gguf", "hf", "executorch"]

# What the gguf library writes: the type that all matrices get.
WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
# What llama.cpp's quantizer makes without a table of importances: the type that most matrices get.
QUANTIZED = {
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "IQ3_M": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "Q2_K": "Q2_K",
}
# What it takes for rows that are no multiple of 256 (tensor_type_fallback in its llama-quant.cpp).
_FALLBACK = {
    "Q6_K": "Q8_0",
    "Q5_K": "Q5_1",
    "Q4_K": "Q5_0",
    "Q3_K": "Q4_0",
    "Q2_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
}
_LARGE_CACHE = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that stands against an export, or makes it worse; a whole sentence."""

    level: Literal["refused", "warning"]
    text: str


def lint(
    config: Mapping[str, Any], target: Target, kinds: Sequence[str] = (), form: Form | None = None
) -> list[Finding]:
    """Say what a format makes of a model.

    Args:
        config: a model's `config`: its components and sizes.
        target: the format.
        kinds: of its types or schemes, in small letters or not; those of hf change nothing.
        form: of a GGUF file, an architecture that is not the model's own.
    """
    if target == "gguf":
        return list(_gguf(config, kinds, form))
    return list({"hf": _hf, "executorch": _executorch}[target](config, kinds))


def lint_deploy(config: Mapping[str, Any]) -> list[Finding]:
    """Say what of a model will not deploy well, in any format: for a model that is still to be trained."""
    kinds: dict[Target, tuple[str, ...]] = {"gguf": ("Q8_0", "Q4_K_M"), "hf": (), "executorch": ("int8_dynamic_int4",)}
    return list(dict.fromkeys(finding for target in kinds for finding in lint(config, target, kinds[target])))


# Settings that the writers of Hugging Face's form and of ExecuTorch's program honour; others must be at their default.
_WRITTEN_SETTINGS = {
    "model": {
        *("component", "vocab_size", "attention", "ffn", "norm", "embed_dim", "num_layers", "num_heads"),
        *("max_seq_len", "tie_embeddings", "init_std"),
    },
    "attention": {
        *("component", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_theta"),
        *("num_kv_heads", "head_dim", "rope_interleaved", "bias"),
    },
    "ffn": {"component", "hidden_dim"},
    "norm": {"component", "eps"},
}


def unwritten_setting(config: Mapping[str, Any]) -> str | None:
    """The first setting of a model that changes its result and that these writers do not know; None: there is none."""
    for group, known in _WRITTEN_SETTINGS.items():
        part = config if group == "model" else config[group]
        defaults = keys_of(group, part["component"])
        for key, value in part.items():
            default = defaults[key].default if key in defaults else None
            neutral = {"component": default.name} if isinstance(default, Component) else default
            written = key in known and (key, part["component"]) != ("rope_interleaved", "mla")
            if not written and (group == "model" or value != neutral):
                return f"{key}={value}" if group == "model" else f"{group}.{key}={value}"
    return None


def gguf_architecture(config: Mapping[str, Any], form: Form | None = None) -> str:
    """The architecture of GGUF that a model is.

    Args:
        form: one that is not its own; None: its own.

    Raises:
        UserError: if it is none, naming the part or the setting.
    """
    return match(config, form).architecture.name


def cached_numbers(config: Mapping[str, Any], architecture: str) -> int:
    """Numbers a token in llama.cpp's cache: of the latent in deepseek2, else of the keys and values of each head."""
    if architecture == "deepseek2":
        return int(config["num_layers"] * latent_width(config))
    return int(config["num_layers"] * kv_heads(config) * sum(_head_dims(config)))


def latent_width(config: Mapping[str, Any]) -> int:
    """Numbers a token and layer that MLA caches."""
    return int(config["attention"]["kv_lora_rank"] + config["attention"]["qk_rope_head_dim"])


def stored_type(kind: str, width: int, *, head: bool = False) -> str:
    """The type that most matrices of a kind get; llama.cpp's quantizer gives some of them more bits.

    Args:
        kind: one of WRITTEN or QUANTIZED.
        width: numbers of a row.
        head: it is the vocabulary's projection, tied or not, which is worth more bits.
    """
    wanted = _wanted(kind, head)
    if width % _block(wanted):
        wanted = _FALLBACK.get(wanted, "F16")
    return wanted if width % _block(wanted) == 0 else "F16"


def _wanted(kind: str, head: bool) -> str:
    if head and kind in QUANTIZED:
        return "Q6_K"
    if head and kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        return "Q8_0"
    return QUANTIZED.get(kind, kind)


def matrices(config: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """{name without its layer: (rows, width of a row, how often it is there)} of a model's matrices."""
    found: dict[str, tuple[int, int, int]] = {}
    for name, (rows, width) in sorted(
        candidates(meta_model(config, "the model")).items(), key=lambda item: not item[0].startswith("layers.")
    ):
        leaf = name.rpartition(".")[2]
        found[leaf] = rows, width, found.get(leaf, (0, 0, 0))[2] + 1
    return found


def _gguf_matrices(config: Mapping[str, Any], architecture: str) -> dict[str, tuple[int, int, int]]:
    """`matrices` as a file has them: deepseek2 stores the keys' half of kv_b_proj transposed."""
    found = matrices(config)
    if architecture == "deepseek2":
        attention, heads = config["attention"], config["num_heads"]
        _, rank, count = found.pop("kv_b_proj")
        found["attn_k_b"] = heads * rank, attention["qk_nope_head_dim"], count
        found["attn_v_b"] = heads * attention["v_head_dim"], rank, count
    return found


def _head_dims(config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers a head of keys and of values."""
    attention = config["attention"]
    if attention["component"] == "mla":
        return attention["qk_nope_head_dim"] + attention["qk_rope_head_dim"], attention["v_head_dim"]
    width = attention["head_dim"] or config["embed_dim"] // config["num_heads"]
    return width, width


def _block(kind: str) -> int:
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def stored_bytes(kind: str, count: int) -> int:
    """Bytes of so many numbers in a type."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return count * size // block


def _gguf(config: Mapping[str, Any], kinds: Sequence[str], form: Form | None) -> Iterator[Finding]:
    try:
        architecture = gguf_architecture(config, form)
    except UserError as error:
        yield Finding("refused", str(error))
        return
    for kind in kinds:
        yield from _odd_rows(config, kind.upper(), architecture)
    context = config["max_seq_len"]
    token = cached_numbers(config, architecture) * 2  # F16
    size = f"{show_bytes(token)} a token, {show_bytes(token * context)} at {context:,} tokens"
    if architecture == "plm":
        latent = cached_numbers(config, "deepseek2") * 2
        yield Finding(
            "warning",
            f"llama.cpp keeps keys and values expanded ({size}), {token / latent:.1f} times the latent's "
            f"{show_bytes(latent)} a token, which --as deepseek2 caches.",
        )
        yield Finding("warning", "llama.cpp aborts on the architecture plm with flash attention: switch it off.")
    elif token * context >= _LARGE_CACHE:
        yield Finding("warning", f"llama.cpp's cache takes {size}: give it a shorter context with -c.")
    if architecture == "deepseek2":
        if latent_width(config) % 32:
            yield Finding(
                "warning",
                f"A token has {latent_width(config)} numbers in a layer's cache, no multiple of 32: llama.cpp cannot "
                "quantize it.",
            )
        yield from _odd_vocabulary(config)
        return
    key, value = _head_dims(config)
    if key % 32 or value % 32:
        yield Finding(
            "warning",
            f"Heads have {key} numbers of keys and {value} of values, which are not both multiples of 32: llama.cpp "
            "cannot quantize their cache.",
        )
    yield from _odd_vocabulary(config)


def _odd_rows(config: Mapping[str, Any], kind: str, architecture: str) -> Iterator[Finding]:
    head = "tok_embeddings" if config["tie_embeddings"] else "output"
    odd: dict[tuple[int, str, str], dict[str, int]] = {}
    for name, (rows, width, count) in _gguf_matrices(config, architecture).items():
        wanted, taken = _wanted(kind, name == head), stored_type(kind, width, head=name == head)
        if taken != wanted:
            odd.setdefault((width, wanted, taken), {})[name] = rows * width * count
    for (width, wanted, taken), held in odd.items():
        cost = stored_bytes(taken, sum(held.values())) - stored_bytes(wanted, sum(held.values()))
        yield Finding(
            "warning",
            f"{', '.join(held)} {'has' if len(held) == 1 else 'have'} rows of {width:,} numbers, no multiple of "
            f"{_block(wanted)}: {kind} stores {taken} instead of {wanted}, {show_bytes(cost)} more.",
        )


def _odd_vocabulary(config: Mapping[str, Any]) -> Iterator[Finding]:
    rows = config["vocab_size"]
    if rows % 32:
        yield Finding(
            "warning",
            f"A vocabulary of {rows:,} rows is no multiple of 32: kernels that take several rows at once leave a rest, "
            f"and it cannot be divided among devices. {-(-rows // 32) * 32:,} rows would do.",
        )


def _hf(config: Mapping[str, Any], kinds: Sequence[str]) -> Iterator[Finding]:
    model_type = _model_type(config)
    family = by_model_type().get(model_type)
    if family is None:
        attention, ffn, norm = (config[part]["component"] for part in ("attention", "ffn", "norm"))
        setting = _setting_without_family(config)
        yield Finding(
            "refused",
            f"Hugging Face's libraries have no model of {attention}, {ffn} and {norm}"
            f"{f' with {setting}' if setting else ''}. They have {', '.join(by_model_type())}.",
        )
        return
    if model_type == "plm":
        yield Finding(
            "warning",
            "transformers, vLLM and SGLang do not know the model_type plm: --as deepseek is for them, larger by a "
            "copy of each up projection and of the embedding.",
        )
    elif not family.in_transformers:
        yield Finding(
            "warning",
            f"transformers does not know the model_type {model_type} itself: it needs the code of the authors' "
            "repository, which the export does not hold.",
        )
    yield from _odd_vocabulary(config)


def _model_type(config: Mapping[str, Any]) -> str:
    """The model_type of config.json that a model gets; plmtune: none of the families."""
    return str(hf_config(meta_model(config, "the model").config, torch.float32)["model_type"])


def _setting_without_family(config: Mapping[str, Any]) -> str | None:
    """The first setting of a part that keeps a model from being one of a family; None: no single one does."""
    for group in ("attention", "ffn", "norm"):
        part = config[group]
        for key, held in keys_of(group, part["component"]).items():
            default = component_config(held.default) if isinstance(held.default, Component) else held.default
            if key in part and part[key] != default:
                other = {**config, "num_layers": 1, group: {**part, key: default}}
                with contextlib.suppress(ValueError, UserError):  # of a width without a default
                    if _model_type(other) != "plmtune":
                        return f"{group}.{key}={part[key]}"
    return None


def _executorch(config: Mapping[str, Any], kinds: Sequence[str]) -> Iterator[Finding]:
    attention, ffn = config["attention"]["component"], config["ffn"]["component"]
    if attention not in ("mla", "gqa", "mha") or ffn not in ("squared_relu", "swiglu"):
        yield Finding(
            "refused",
            f"The program for ExecuTorch has no {attention} with {ffn}: it has mla, gqa and mha, squared_relu and "
            "swiglu.",
        )
    elif setting := unwritten_setting(config):
        yield Finding("refused", f"The program for ExecuTorch has no {setting} of the model {config['component']}.")
    elif any("int4" in kind.lower() for kind in kinds):
        odd = {name: width for name, (_, width, _) in matrices(config).items() if width % 32}
        odd.pop("tok_embeddings", None)  # of 8 bits in any case
        if odd:
            named = ", ".join(f"{name} ({width:,})" for name, width in odd.items())
            yield Finding("warning", f"XNNPACK wants groups of 32 numbers, so the rows of {named} stay in 8 bits.")
