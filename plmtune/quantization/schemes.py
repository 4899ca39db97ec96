"""Schemes: which matrix of a model is stored how. Each gives {module name: Format} for a model."""

from __future__ import annotations

from torch import nn

from plmtune.modules.quantized import Format
from plmtune.registry import register


@register("quantization", "int4")
def int4(
    model: nn.Module,
    *,
    group_size: int = 32,
    embedding: str = "int8",
    rules: dict[str, str] | None = None,
    qat: bool = False,
) -> dict[str, Format]:
    """Weights of 4 bits in groups; written in full soon."""
    plan = {name: Format(4, group_size) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return plan | {"tok_embeddings": Format.parse(embedding)}
