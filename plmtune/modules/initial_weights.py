"""The numbers that a model starts with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from plmtune.modules.sharding import is_sharded, shard_like


@torch.no_grad()
def draw_weights(model: nn.Module, std: float, generator: torch.Generator | None) -> None:
    """`Decoder.init_weights`, with matrices from N(0, std).

    A module's `initial` says what parameters of its own start with instead: {name: a number, or a vector}. Matrices of
    a module that is `drawn_last` are drawn after all others, which are then the same as without it.
    """
    offsets = {f"{name}.weight" for name, module in model.named_modules() if getattr(module, "unit_offset", False)}
    initial: dict[str, Any] = {}
    last: set[str] = set()
    for prefix, module in model.named_modules():
        initial |= {f"{prefix}.{key}": value for key, value in getattr(module, "initial", {}).items()}
        if getattr(module, "drawn_last", False):
            last |= {f"{prefix}.{key}" for key, _ in module.named_parameters()}
    for name, parameter in sorted(model.named_parameters(), key=lambda named: named[0] in last):
        if parameter.is_meta:
            continue
        if name in initial:
            whole = torch.as_tensor(initial[name], dtype=parameter.dtype, device=parameter.device)
            whole = whole.expand(parameter.shape).contiguous()
            parameter.copy_(shard_like(whole, parameter) if is_sharded(parameter) else whole)
        elif parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") or name in offsets else 1.0)
        elif generator is None and not is_sharded(parameter):
            parameter.normal_(0.0, std)
        else:
            device = generator.device if generator is not None else parameter.device
            whole = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            whole.normal_(0.0, std, generator=generator)
            parameter.copy_(shard_like(whole, parameter) if is_sharded(parameter) else whole)
