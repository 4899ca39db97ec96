"""Adapters (LoRA, QLoRA, DoRA) by torchtune's layers.

A component of this group changes a decoder in place and freezes everything but the adapters and a score head. The
decoder must hold the base's weights: QLoRA quantizes them, and DoRA starts from their norms. So: build, `to_empty`,
load the base, adapt, distribute, make the optimizer. On the meta device nothing is drawn or quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.modules.attributes import with_attributes
from plmtune.modules.linear import Linear
from plmtune.modules.quantized import Quantized
from plmtune.modules.torchtune_layers import layers
from plmtune.ranges import SHARE, WIDTH, Range, check
from plmtune.registry import register

_BLOCK = 64  # numbers that share a scale in NF4
_SCALES = 256  # scales that share a scale of theirs


@register("peft", "lora")
def lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("attention", "ffn"),
) -> None:
    """LoRA (arXiv 2106.09685): W x + alpha / rank B A x, with A [rank, in] and B [out, rank] trained.

    Args:
        model: a decoder that holds the base's weights; changed in place.
        rank: width of the adapters.
        alpha: their weight is alpha / rank.
        dropout: share of the adapters' inputs that training leaves out.
        targets: attention and ffn (all linear layers of each), layers by name (q_proj), or by their full name
            (layers.0.attention.q_proj).

    Raises:
        ValueError: for a setting out of its range, or a target that the model lacks.
    """
    _adapt(model, rank, alpha, dropout, targets, layers().lora_linear)


@register("peft", "qlora")
def qlora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("attention", "ffn"),
) -> None:
    """QLoRA (arXiv 2305.14314): LoRA beside weights of 4 bits (NF4), about an eighth of fp32's memory.

    Args:
        model, rank, alpha, dropout, targets: as for lora; other layers are not quantized.

    Raises:
        ValueError: for a setting out of its range, a target that the model lacks, or weights whose numbers are no
            multiple of 64.
    """
    found = layers()
    _adapt(model, rank, alpha, dropout, targets, found.lora_linear)
    for name, layer in adapted(model).items():
        # torchtune quantizes random weights as it builds; here the base's own weight is quantized.
        layer._quantize_base = True
        count = layer.weight.numel()
        if count % _BLOCK:
            raise ValueError(
                f"NF4 needs multiples of {_BLOCK} numbers, but {name} has {count}: leave it out of peft.targets, "
                "or use peft=lora"
            )
        if layer.weight.is_meta:
            continue
        weight = found.to_nf4(layer.weight.detach(), _BLOCK, math.gcd(count // _BLOCK, _SCALES))
        layer.weight = nn.Parameter(weight, requires_grad=False)


@register("peft", "dora")
def dora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("attention", "ffn"),
) -> None:
    """DoRA (arXiv 2402.09353): LoRA changes the direction of a weight's rows, trained numbers their length.

    Args:
        model, rank, alpha, dropout, targets: as for lora.

    Raises:
        ValueError: for a setting out of its range, a target that the model lacks, or one with a bias, which
            torchtune's layer would scale.
    """
    _adapt(model, rank, alpha, dropout, targets, layers().dora_linear, biases=False)


def _adapt(
    model: Any,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    make: Callable[..., Any],
    biases: bool = True,
) -> None:
    check(WIDTH, rank=rank)
    check(Range(above=0, most=1e6), alpha=alpha)
    check(SHARE, dropout=dropout)
    if adapted(model):
        raise ValueError("the model has adapters already: merge them before adding new ones")
    chosen = _choose(model, targets)
    for name, linear in chosen.items():
        if linear.bias is not None and not biases:
            raise ValueError(f"{name} has a bias, which dora does not take: use lora, or other targets")
    model.requires_grad_(False)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    for name, linear in chosen.items():
        sizes = {"in_dim": linear.in_features, "out_dim": linear.out_features, "use_bias": linear.bias is not None}
        # On meta, so that no second weight is allocated.
        with torch.device("meta"):
            layer = make(rank=rank, alpha=alpha, dropout=dropout, **sizes)
        like = linear.weight
        layer.weight, layer.bias = like, linear.bias
        for parameter, trained in list(_adapter_parameters(layer).items()):
            owner, _, leaf = parameter.rpartition(".")
            memory = torch.empty(trained.shape, dtype=like.dtype, device=like.device)
            setattr(layer.get_submodule(owner), leaf, nn.Parameter(memory))
        layer.train(linear.training)
        model.set_submodule(name, layer)
    init_adapters(model)


def _choose(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that `targets` select, by their full names."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.")
    }
    chosen: dict[str, nn.Linear] = {}
    for target in targets:
        # layers.0.attention.q_proj: target is attention, q_proj, the whole or a beginning of it
        found = {
            name: module
            for name, module in linears.items()
            if target in name.split(".")[2:] or f"{name}.".startswith(f"{target}.")
        }
        if not found:
            known = dict.fromkeys(part for name in linears for part in name.split(".")[2:])
            raise ValueError(f"targets: the model has no {target!r}; it has {', '.join(known)}")
        chosen |= found
    if not chosen:
        raise ValueError("targets: at least one is needed")
    return {name: linears[name] for name in linears if name in chosen}


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_a")}


def _adapter_parameters(layer: Any) -> dict[str, nn.Parameter]:
    named = dict(layer.named_parameters())
    return {name: named[name] for name in layer.adapter_params()}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of a model with adapters, the score head's included, by name."""
    found = {
        f"{name}.{parameter}": tensor
        for name, layer in adapted(model).items()
        for parameter, tensor in _adapter_parameters(layer).items()
    }
    return found | {name: tensor for name, tensor in model.named_parameters() if name.startswith("score.")}


@torch.no_grad()
def init_adapters(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw A from U(-1, 1) / sqrt(in), set B to 0 and DoRA's lengths to those of the base's rows.

    The model then equals its base. With a generator the numbers depend on it alone.
    """
    for layer in adapted(model).values():
        a, b = layer.lora_a.weight, layer.lora_b.weight
        if a.is_meta:
            continue
        bound = 1 / math.sqrt(layer.in_dim)
        device = generator.device if generator is not None else a.device
        drawn = torch.empty(a.shape, dtype=torch.float32, device=device)
        a.copy_(drawn.uniform_(-bound, bound, generator=generator))
        b.zero_()
        if hasattr(layer, "magnitude"):
            layer.initialize_dora_magnitude()


def effective_weight(layer: Any) -> Tensor:
    """The weight [out, in] that a linear layer multiplies by, with adapters merged.

    Of a quantized layer: dequantized; in quantization-aware training: fake-quantized.
    """
    if isinstance(layer, Quantized):
        return layer.dequantize()
    weight: Tensor = layer.weight
    if hasattr(layer, "weight_fake_quantizer"):
        weight = layer.weight_fake_quantizer(weight)
    if not hasattr(layer, "lora_a"):
        return weight
    a, b = layer.lora_a.weight, layer.lora_b.weight
    if layer._quantize_base:
        weight = weight.to(a.dtype)
    if layer.disabled:
        return weight
    if not hasattr(layer, "magnitude"):
        return weight + layer.alpha / layer.rank * (b @ a)
    direction = weight + layer.scaling * (b @ a)
    return direction * (layer.magnitude / torch.linalg.norm(direction, dim=1))[:, None]


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Merge adapters into their base weights: plain linear layers again, all of them trained.

    QLoRA's base is its dequantized 4-bit weights, which the adapters were trained with.
    """
    for name, layer in adapted(model).items():
        weight = effective_weight(layer)
        with torch.device("meta"):
            linear = Linear(layer.in_dim, layer.out_dim, bias=layer.bias is not None)
        linear.weight, linear.bias = nn.Parameter(weight), layer.bias
        model.set_submodule(name, linear.train(layer.training))
    model.requires_grad_(True)
    if hasattr(model, "score") and not model.tied:
        model.output.requires_grad_(False)  # as add_score_head has it


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Disable a model's adapters inside the context."""
    return with_attributes(adapted(model).values(), disabled=True)
