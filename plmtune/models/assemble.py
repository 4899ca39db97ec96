"""From components to a decoder, and from a decoder's saved description back to components."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from plmtune.errors import UserError, did_you_mean
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, keys_of

LayerType = Literal["global", "local", "nope"]


def assemble(
    name: str,
    settings: Mapping[str, Any],
    *,
    layers: Sequence[LayerType] | None = None,
    local_rope_theta: float | None = None,
    **decoder: Any,
) -> Decoder:
    """Build the decoder of the registered model `name`; its `config` describes it in full.

    Args:
        settings: the parameters of the registered function, all of them: vocab_size, attention, ffn, norm, embed_dim,
            num_layers, num_heads, max_seq_len, tie_embeddings, init_std, and the family's own.
        layers: types of layers, repeated until there are num_layers. A global layer has no window, a local one has it,
            and a nope layer has neither window nor RoPE. None: all layers are as attention says.
        local_rope_theta: base of local layers' RoPE, which is then not scaled; None: as of the others.
        decoder: further arguments of `Decoder`.

    Raises:
        ValueError: if the attention has no windows that a layer could have or lack.
    """
    attention, ffn, norm = settings["attention"], settings["ffn"], settings["norm"]
    pattern = [_of_type(attention, kind, local_rope_theta) for kind in layers] if layers else [attention]
    sizes = {key: settings[key] for key in ("embed_dim", "num_heads", "max_seq_len")}

    def attention_of(index: int) -> nn.Module:
        part = pattern[index % len(pattern)]
        every = part.settings.get("value_embed")
        if every and (settings["num_layers"] - 1 - index) % every:
            part = Component(part.group, part.name, part.settings | {"value_embed": None})
        made: nn.Module = part(**sizes, norm=lambda dim: norm(dim=dim))
        return made

    model = Decoder(
        vocab_size=settings["vocab_size"],
        embed_dim=settings["embed_dim"],
        num_layers=settings["num_layers"],
        max_seq_len=settings["max_seq_len"],
        attention=attention_of,
        ffn=lambda: ffn(embed_dim=settings["embed_dim"]),
        norm=lambda dim: norm(dim=dim),
        tie_embeddings=settings["tie_embeddings"],
        init_std=settings["init_std"],
        **decoder,
    )
    model.config = {"component": name} | {
        key: component_config(value) if isinstance(value, Component) else value for key, value in settings.items()
    }
    return model


def _of_type(attention: Component, kind: LayerType, local_rope_theta: float | None) -> Component:
    """The attention of a layer of one type."""
    changed: dict[str, Any] = {}
    if kind != "local":
        changed["window"] = None
    elif local_rope_theta is not None:
        changed |= {"rope_theta": local_rope_theta, "rope_scaling": Component("rope_scaling", "none")}
    if kind == "nope":
        changed["rope"] = False
    if lacking := sorted(changed.keys() - keys_of("attention", attention.name).keys()):
        raise ValueError(f"attention {attention.name} has no {lacking[0]}, which layers of type {kind} set: use gqa")
    return Component(attention.group, attention.name, attention.settings | changed)


def component_config(part: Component) -> dict[str, Any]:
    """Return a component as plain data, defaults written out: a new default must not change a saved model."""
    settings = {key: part.settings.get(key, k.default) for key, k in keys_of(part.group, part.name).items()}
    return {"component": part.name} | {
        key: component_config(value) if isinstance(value, Component) else value for key, value in settings.items()
    }


def meta_model(config: Mapping[str, Any], where: str) -> Decoder:
    """The model of a `config`, on the meta device; arguments as for `component_from_config`."""
    with torch.device("meta"):
        model: Decoder = component_from_config("model", dict(config), where)(vocab_size=config["vocab_size"])
    return model


def component_from_config(group: str, data: Any, where: str) -> Component:
    """Return the component that `component_config` describes, checking names and types against its signature.

    Only the registry is asked, so an untrusted file can name only what is registered.

    Args:
        where: file and key, for messages.

    Raises:
        UserError: for anything that is not such a description.
    """
    if not isinstance(data, dict) or not isinstance(data.get("component"), str):
        raise UserError(f"{where}: must be a table whose key component names the {group}, not {data!r:.80}")
    name = data["component"]
    try:
        keys = keys_of(group, name)
    except UserError as error:
        raise UserError(f"{where}: {error} If it is your own, give its module with --import.") from error
    settings: dict[str, Any] = {}
    for key, value in data.items():
        if key == "component" or (group == "model" and key == "vocab_size"):
            continue
        if key not in keys:
            raise UserError(f"{where}.{key}: {group} {name} has no such setting.{did_you_mean(key, keys)}")
        if isinstance(keys[key].default, Component):
            settings[key] = component_from_config(keys[key].default.group, value, f"{where}.{key}")
        elif not _fits(value, keys[key].type):
            raise UserError(f"{where}.{key}: {value!r:.80} is not of type {_type_name(keys[key].type)}")
        else:
            settings[key] = value
    return Component(group, name, settings)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Annotated:
        return _fits(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) else str(hint)
