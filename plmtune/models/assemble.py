"""From components to a decoder, and from a decoder's saved description back to components."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

from plmtune.errors import UserError, did_you_mean
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, keys_of


def assemble(
    name: str,
    *,
    vocab_size: int,
    attention: Component,
    ffn: Component,
    norm: Component,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    max_seq_len: int,
    tie_embeddings: bool,
    init_std: float,
) -> Decoder:
    """Build the decoder of the registered model `name`; its `config` component_configs it in full."""
    decoder = Decoder(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        max_seq_len=max_seq_len,
        attention=lambda: attention(
            embed_dim=embed_dim, num_heads=num_heads, max_seq_len=max_seq_len, norm=lambda dim: norm(dim=dim)
        ),
        ffn=lambda: ffn(embed_dim=embed_dim),
        norm=lambda dim: norm(dim=dim),
        tie_embeddings=tie_embeddings,
        init_std=init_std,
    )
    decoder.config = {
        "component": name,
        "vocab_size": vocab_size,
        "attention": component_config(attention),
        "ffn": component_config(ffn),
        "norm": component_config(norm),
        "embed_dim": embed_dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "max_seq_len": max_seq_len,
        "tie_embeddings": tie_embeddings,
        "init_std": init_std,
    }
    return decoder


def component_config(part: Component) -> dict[str, Any]:
    """Return a component as plain data, defaults written out: a new default must not change a saved model."""
    settings = {key: part.settings.get(key, k.default) for key, k in keys_of(part.group, part.name).items()}
    return {"component": part.name} | {
        key: component_config(value) if isinstance(value, Component) else value for key, value in settings.items()
    }


def component_from_config(group: str, data: Any, where: str) -> Component:
    """Return the component that `component_config` component_configd, checking names and types against its signature.

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
