"""Models in a GGUF architecture that is not their own, and which architecture a file has.

`deepseek2` for a PLM: llama.cpp's own architecture `plm` expands the cache to keys and values of all heads and aborts
with flash attention; `deepseek2` caches the latent alone. It has SwiGLU, so squared ReLU is stored as one
(`gguf_squared_relu`). The key `plmtune.squared_relu_factors` tells such a file from a DeepSeek, so that it is read as
the PLM that it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from plmtune.errors import UserError
from plmtune.models.gguf_architectures import BY_NAME, Architecture
from plmtune.models.gguf_keys import Metadata
from plmtune.models.gguf_squared_relu import KEY, Factors

Form = Literal["deepseek2"]


def _read(keys: Metadata) -> dict[str, Any]:
    settings = BY_NAME["deepseek2"].read(keys)
    attention = {key: value for key, value in settings["attention"].items() if key != "latent_eps"}
    return settings | {"attention": attention, "ffn": settings["ffn"] | {"component": "squared_relu"}}


_OWN = BY_NAME["deepseek2"]
FORMS: dict[Form, Architecture] = {
    "deepseek2": replace(
        _OWN,
        component="plm",
        parts=(("mla",), "squared_relu", "rms_norm"),
        read=_read,
        layout=replace(_OWN.layout, squared_relu=Factors()),
    )
}


def with_factors(architecture: Architecture, factors: Factors) -> Architecture:
    """The architecture with an FFN stored times factors."""
    return replace(architecture, layout=replace(architecture.layout, squared_relu=factors))


def architecture_of(metadata: Mapping[str, Any], path: Path) -> Architecture | None:
    """The architecture of a file; None: it is unknown.

    Raises:
        UserError: if the file's own key of a form says something impossible.
    """
    name, factors = metadata.get("general.architecture"), Factors.read(metadata, path)
    if factors is None:
        return BY_NAME.get(name) if isinstance(name, str) else None
    form = FORMS["deepseek2"]
    if name != form.name:
        raise UserError(f"{path}: {KEY} is a key of {form.name}, and general.architecture is {name!r:.80}.")
    return with_factors(form, factors)
