"""A model whose layers and units are multiplied by masks: with masks of 0 and 1 it computes what `apply_cut` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from plmtune.modules.decoder import Decoder
from plmtune.pruning.groups import CHANNELS, groups_of

LAYERS = "layers"  # the name of the mask over layers, beside those of groups


@contextmanager
def masked(model: Decoder, masks: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
    """Inside the context, mask the model's layers and units. The same mask stands wherever a unit does: that of the
    channels at the embedding, every norm, and every projection into the residual stream.

    Args:
        masks: called once a forward; gives by group name, or LAYERS, numbers from 0 to 1, one a unit. A group without
            a mask is whole.
    """
    groups = groups_of(model)
    now: dict[str, Tensor] = {}

    def begin(_: Any, __: Any, ___: Any) -> None:
        now.clear()
        now.update(masks())

    def mask_input(names: Sequence[str], inputs: int) -> Callable[..., Any]:
        held = [(name, inputs // groups[name].units) for name in names if name in groups]

        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = arguments[0]
            for name, width in held:
                if name in now:
                    x = x * now[name].repeat_interleave(width)
            return (x, *arguments[1:])

        return hook

    def mask_channels(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * now[CHANNELS] if CHANNELS in now else output

    def mask_norm(name: str) -> Callable[..., Any]:
        def hook(norm: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return masked_norm(norm, arguments[0], now[name]) if name in now else output

        return hook

    def mask_layer(index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # What the layer adds to its input, of which the channels may be masked.
            x = arguments[0] * now[CHANNELS] if index == 0 and CHANNELS in now else arguments[0]
            return x + now[LAYERS][index] * (output - x) if LAYERS in now else output

        return hook

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(model.layers[0].register_forward_pre_hook(mask_input((CHANNELS,), model.embed_dim)).remove)
        if model.query_embeddings is not None:
            stack.callback(model.query_embeddings.register_forward_hook(mask_channels).remove)
        for group in groups.values():
            for name in group.norms:
                stack.callback(model.get_submodule(name).register_forward_hook(mask_norm(group.name)).remove)
        for index, layer in enumerate(model.layers):
            held: Any = layer
            inputs = {held.ffn.down_proj: ("neurons",), held.attention.o_proj: ("heads", "kv_heads")}
            for module, kinds in inputs.items():
                names = [f"layers.{index}.{kind}" for kind in kinds]
                stack.callback(module.register_forward_pre_hook(mask_input(names, module.in_features)).remove)
                stack.callback(module.register_forward_hook(mask_channels).remove)
            if getattr(held.attention, "shortcut", None) is not None:
                stack.callback(held.attention.shortcut.register_forward_hook(mask_channels).remove)
            stack.callback(layer.register_forward_hook(mask_layer(index)).remove)
        yield


def masked_norm(norm: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """A norm over the units that stay, as the cut model's norm computes it: its statistics count each by its mask.

    Args:
        norm: RMS norm, or layer norm, which has a bias.
        x (Tensor): [..., d].
        mask (Tensor): [d].
    """
    held: Any = norm
    wide, z = x.float(), mask.float()
    count = z.sum()
    if getattr(held, "bias", None) is not None:
        wide = wide - (wide * z).sum(-1, keepdim=True) / count
    wide = wide * z
    found = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / count + held.eps)
    weight = held.weight.float() + 1 if getattr(held, "unit_offset", False) else held.weight.float()
    found = found * weight
    if getattr(held, "bias", None) is not None:
        found = (found + held.bias.float()) * z
    return cast(Tensor, found.to(x.dtype))
