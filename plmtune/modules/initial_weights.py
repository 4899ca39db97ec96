"""The numbers that a model starts with.

An init says how far the standard deviation of each matrix is from the model's `init_std`. The four are those that
PanGu-pi Pro compares (arXiv 2402.02791, section 3.3) at 1B parameters and 50B tokens; its mean scores stand beside
them. The paper names GPT-2's and InternLM's without their formulas, which here are those of their code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.modules.sharding import is_sharded, shard_like
from plmtune.registry import register

Init = Callable[[str, int], float]  # a parameter's name, and the number of layers -> a factor of init_std


@register("init", "constant")
def constant() -> Init:
    """std = init_std for every matrix (42.59); what a model has without an init."""
    return lambda name, num_layers: 1.0


@register("init", "gpt2")
def gpt2() -> Init:
    """GPT-2's: std = init_std / sqrt(2 num_layers) for the output projections of attention and FFN (42.13).

    Each of the 2 num_layers parts adds to the residual stream, which then has the variance of one of them.
    """
    return lambda name, num_layers: (2 * num_layers) ** -0.5 if _place(name)[1] in _OUTPUTS else 1.0


@register("init", "internlm")
def internlm() -> Init:
    """InternLM2's: std = init_std / sqrt(2 l) in layer l = 1, 2, ... for attention's output projection and all matrices
    of the FFN (41.19; `reset_attn_parameters` of its training code).
    """

    def factor(name: str, num_layers: int) -> float:
        layer, part = _place(name)
        return (2 * layer) ** -0.5 if part == _OUTPUTS[0] or part.startswith("ffn.") else 1.0

    return factor


@register("init", "depth")
def depth() -> Init:
    """Depth-dependent: std = init_std / sqrt(2 l) in layer l = 1, 2, ... for the output projections of attention and
    FFN (42.94). The form is OLMo's and torchtitan's (`depth_init`).
    """

    def factor(name: str, num_layers: int) -> float:
        layer, part = _place(name)
        return (2 * layer) ** -0.5 if part in _OUTPUTS else 1.0

    return factor


_OUTPUTS = ("attention.o_proj", "ffn.down_proj")


def _place(name: str) -> tuple[int, str]:
    """(layer, from 1 on, module inside it) of ``layers.0.ffn.up_proj.weight``; (0, "") of what is in no layer."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    return (int(found[1]) + 1, found[2]) if found else (0, "")


@torch.no_grad()
def draw_weights(
    model: nn.Module,
    std: float,
    generator: torch.Generator | None,
    init: Init | None = None,
    num_layers: int = 1,
    *,
    into: Mapping[str, Tensor] | None = None,
) -> None:
    """`Decoder.init_weights`, with matrices from N(0, std init(name, num_layers)).

    A module's `initial` says what parameters of its own start with instead: {name: a number, or a vector}. Matrices of
    a module that is `drawn_last` are drawn after all others, which are then the same as without it.

    Args:
        into: some of the model's tensors by name, which get the numbers; the model may be on the meta device. None: the
            model's own.
    """
    offsets = {f"{name}.weight" for name, module in model.named_modules() if getattr(module, "unit_offset", False)}
    initial: dict[str, Any] = {}
    last: set[str] = set()
    for prefix, module in model.named_modules():
        initial |= {f"{prefix}.{key}": value for key, value in getattr(module, "initial", {}).items()}
        if getattr(module, "drawn_last", False):
            last |= {f"{prefix}.{key}" for key, _ in module.named_parameters()}
    for name, parameter in sorted(model.named_parameters(), key=lambda named: named[0] in last):
        target = parameter if into is None else into.get(name)
        if into is None and parameter.is_meta:
            continue
        if name in initial:
            _set(target, torch.as_tensor(initial[name], dtype=parameter.dtype).expand(parameter.shape).contiguous())
        elif parameter.ndim < 2:
            if target is not None:
                target.fill_(0.0 if name.endswith("bias") or name in offsets else 1.0)
        else:
            own = std if init is None else std * init(name, num_layers)
            if target is not None and generator is None and not is_sharded(target):
                target.normal_(0.0, own)
                continue
            device = generator.device if generator is not None else parameter.device
            if target is None and generator is None:
                continue
            _set(target, torch.empty(parameter.shape, device=device).normal_(0.0, own, generator=generator))


def _set(target: Tensor | None, whole: Tensor) -> None:
    if target is not None:
        target.copy_(shard_like(whole, target) if is_sharded(target) else whole)
