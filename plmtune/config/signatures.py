"""Schemas for OmegaConf, made of dataclasses and of the signatures of registered components."""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Any, Literal

from plmtune.config.schema import component_keys
from plmtune.registry import Component, Key, describe_components, keys_of

# Type name -> its keys, to find the nearest right one for a wrong one.
FIELDS: dict[str, list[str]] = {}


def is_component(annotation: Any) -> bool:
    return annotation is Component or Component in typing.get_args(annotation)


def dict_group(annotation: Any) -> str | None:
    """The group of ``Annotated[dict[str, Component], "group"]``."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, group = typing.get_args(annotation)[:2]
        if typing.get_args(inner)[1:] == (Component,):
            return str(group)
    return None


def is_text_list(annotation: Any) -> bool:
    """Whether a key holds a list of texts, which a single text may stand for."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return is_text_list(arguments[0])
    return origin in (list, tuple) and (typing.get_args(arguments[0]) or arguments)[0] is str


def plain_type(annotation: Any) -> Any:
    """The nearest type that OmegaConf checks: Literal becomes the type of its values, a component Any."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if is_component(annotation) or is_text_list(annotation):
        return Any
    if origin is typing.Annotated:
        return dict[str, Any] if dict_group(annotation) else plain_type(arguments[0])
    if origin is Literal:
        return type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(plain_type(a) for a in arguments)]  # noqa: UP007  (built from values)
    if origin in (list, tuple, dict):
        return origin[tuple(a if a is Ellipsis else plain_type(a) for a in arguments)]
    if dataclasses.is_dataclass(annotation):
        return plain_schema(typing.cast(Any, annotation))
    return annotation


def _field(key: Key) -> tuple[str, Any, Any]:
    default = None if isinstance(key.default, Component) else key.default
    if isinstance(default, list | dict | tuple):
        return key.name, plain_type(key.type), dataclasses.field(default_factory=lambda: default)
    return key.name, plain_type(key.type), dataclasses.field(default=default)


@cache
def plain_schema(schema: Any) -> Any:
    hints = typing.get_type_hints(schema, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(schema):
        kind = plain_type(hints[item.name])
        if dataclasses.is_dataclass(hints[item.name]):
            fields.append((item.name, kind, dataclasses.field(default_factory=kind)))
        elif item.default_factory is not dataclasses.MISSING:
            fields.append((item.name, kind, dataclasses.field(default_factory=item.default_factory)))
        else:
            fields.append((item.name, kind, dataclasses.field(default=item.default)))
    FIELDS[schema.__name__] = [name for name, _, _ in fields]
    return dataclasses.make_dataclass(schema.__name__, fields)


@cache
def component_schema(group: str, name: str) -> Any:
    """The schema of a component: its name under ``component``, then its keys."""
    fields = [
        ("component", str, dataclasses.field(default=name)),
        *map(_field, keys_of(group, name).values()),
    ]
    FIELDS[f"{group}__{name}"] = [key for key, _, _ in fields[1:]]
    return dataclasses.make_dataclass(f"{group}__{name}", fields)


def dict_keys() -> set[str]:
    """Full keys that hold a dictionary whose names the user chooses."""
    return _dict_keys_of(frozenset(component_keys()))


@cache
def _dict_keys_of(groups: frozenset[str]) -> set[str]:
    return {
        f"{group}.{key.name}"
        for group in groups
        for name in describe_components().get(group, {})
        for key in keys_of(group, name).values()
        if plain_type(key.type) == dict[str, Any]
    }
