"""A PLM for llama.cpp in its own architecture beside `--as deepseek2`: which takes less memory at which context."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plmtune.devices import costs
from plmtune.devices.costs import ModelShape
from plmtune.errors import UserError
from plmtune.export.lint import gguf_architecture
from plmtune.models.gguf_file import GGUFFile, opened_gguf
from plmtune.models.gguf_squared_relu import KEY
from plmtune.units import show_bytes


@dataclass(frozen=True)
class Form:
    """What one of the two takes.

    Attributes:
        cached: bytes a token in llama.cpp's cache, in F16.
        file: bytes.
    """

    cached: int
    file: int


def of_model(model_shape: ModelShape, scheme: str) -> tuple[Form, Form] | None:
    """A model's forms (plm, deepseek2) in a type of GGUF, without the tokenizer; None: it is no PLM."""
    try:
        gguf_architecture(model_shape.model.config, "deepseek2")
    except UserError:
        return None
    own, other = (
        Form(costs.cache_bytes(shape, "llama.cpp"), costs.weights(shape, "llama.cpp", scheme).file)
        for shape in (model_shape, model_shape.as_deepseek2())
    )
    return own, other


def of_file(path: Path) -> tuple[Form, Form, bool] | None:
    """The forms (plm, deepseek2) of a PLM's file, the other one estimated, and whether it is the second; None: it holds
    no PLM."""
    with opened_gguf(path) as file:
        architecture = file.metadata.get("general.architecture")
        is_second = architecture == "deepseek2" and KEY in file.metadata
        if architecture != "plm" and not is_second:
            return None
        names = {"ffn_gate" if is_second else "ffn_up": 0}
        copied = sum(tensor.num_bytes for name, tensor in file.tensors.items() if name.split(".")[-2] in names)
        cached = {form: 2 * cached_numbers(file, form) for form in ("plm", "deepseek2")}
    size = path.stat().st_size
    sizes = (size - copied, size) if is_second else (size, size + copied)
    return Form(cached["plm"], sizes[0]), Form(cached["deepseek2"], sizes[1]), is_second


def cached_numbers(file: GGUFFile, form: str | None = None) -> int:
    """Numbers a token in llama.cpp's cache of a file; of one that is plm or deepseek2, also if it were `form`."""
    architecture = file.metadata.get("general.architecture")

    def number(key: str, default: int = 0) -> int:
        value = file.metadata.get(f"{architecture}.{key}", default)
        return value if type(value) is int else default

    if (form or architecture) == "deepseek2":
        return number("block_count") * (number("attention.kv_lora_rank") + number("rope.dimension_count"))
    mla = "_mla" if architecture == "deepseek2" else ""
    heads = number("attention.head_count")
    kv_heads = heads if mla else number("attention.head_count_kv", heads)
    width = number("embedding_length") // max(heads, 1)
    widths = number(f"attention.key_length{mla}", width) + number(f"attention.value_length{mla}", width)
    return number("block_count") * kv_heads * widths


def comparison(own: Form, other: Form, context: int) -> str:
    """What the form deepseek2 takes instead of the model's own, at so many tokens: the end of a sentence."""
    saved, grown = own.cached - other.cached, other.file - own.file
    pays = "less memory at any context"
    if saved <= 0:
        pays = "more memory at any context"
    elif grown > 0:
        pays = f"less memory from {-(-grown // saved):,} tokens on"
    return (
        f"a cache of {show_bytes(other.cached * context)} instead of {show_bytes(own.cached * context)} at {context:,} "
        f"tokens, a file of {show_bytes(other.file)} instead of {show_bytes(own.file)}: {pays}"
    )
