"""The families that load, by `model_type` of config.json and by registered model."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from plmtune.models.family import Family
from plmtune.models.hf_names import STANDARD, Names

# The files of this folder that hold a Family; the first that has such a model is written.
FILES = (
    "plm", "llama", "qwen2", "qwen3", "smollm3", "mistral", "gemma", "phi3", "minicpm", "granite", "arcee", "ernie4_5",
    "starcoder2", "stablelm", "glm", "deepseek", "gpt2",
)  # fmt: skip


@cache
def families() -> tuple[Family, ...]:
    """All families, in the order of `FILES`."""
    modules = [importlib.import_module(f"plmtune.models.{file}") for file in FILES]
    return tuple(held for module in modules for held in vars(module).values() if isinstance(held, Family))


def by_model_type() -> dict[str, Family]:
    """Families by the `model_type` of their config.json."""
    return {model_type: family for family in families() for model_type in family.architectures}


@cache
def model_types() -> dict[str, str]:
    """`model_type` -> the registered model, from the source of `FILES`: importing them would import torch."""
    found: dict[str, str] = {}
    for file in FILES:
        text = Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Call(ast.Name("Family"), [ast.Constant(str(component)), ast.Dict(names), *_]):
                    found |= {ast.literal_eval(name): component for name in names if name is not None}
    return found


def by_component() -> dict[str, Family]:
    """Families by the registered model."""
    return {family.component: family for family in families()}


def names_of(keys: Mapping[str, Any]) -> Names:
    """The names of the tensors beside a config.json, which its `model_type` decides."""
    family = by_model_type().get(str(keys.get("model_type")))
    return STANDARD if family is None else family.names
