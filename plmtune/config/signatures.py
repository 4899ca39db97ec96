"""Schemas, made of dataclasses and of the signatures of registered components, for OmegaConf and Hydra's store."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plmtune.config.schema import SCHEMAS, component_keys
from plmtune.errors import UserError
from plmtune.registry import Component, describe_components, keys_of

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


def _schema(name: str, keys: Iterable[tuple[str, Any, Any]], *fixed: tuple[str, Any, Any]) -> Any:
    """A dataclass of keys: their names, annotations and defaults."""
    fields = [*fixed]
    for key, annotation, default in keys:
        kind: Any = plain_type(annotation)
        if dataclasses.is_dataclass(kind) or isinstance(default, list | dict | tuple):
            make: Any = kind if dataclasses.is_dataclass(kind) else partial(copy.copy, default)
            fields.append((key, kind, dataclasses.field(default_factory=make)))
        else:
            fields.append((key, kind, None if isinstance(default, Component) else default))
    FIELDS[name] = [key for key, _, _ in fields[len(fixed) :]]
    return dataclasses.make_dataclass(name, fields)


@cache
def plain_schema(schema: Any) -> Any:
    """The schema of a section of the config, or of a whole one."""
    hints = typing.get_type_hints(schema, include_extras=True)
    made = {item.name: item.default for item in dataclasses.fields(schema)}
    made |= {f.name: f.default_factory() for f in dataclasses.fields(schema) if callable(f.default_factory)}
    return _schema(schema.__name__, ((name, hints[name], default) for name, default in made.items()))


@cache
def component_schema(group: str, name: str) -> Any:
    """The schema of a component: its name under ``component``, then its keys."""
    keys = ((key.name, key.type, key.default) for key in keys_of(group, name).values())
    return _schema(f"{group}__{name}", keys, ("component", str, dataclasses.field(default=name)))


def dict_keys() -> set[str]:
    """Full keys that hold a dictionary whose names the user chooses."""
    every = [item for schema in SCHEMAS.values() for item in dataclasses.fields(schema)]
    plain = {item.name for item in every if item.type == "dict[str, Any]"}
    return plain | {
        f"{group}.{key.name}"
        for group in component_keys()
        for name in describe_components().get(group, {})
        for key in keys_of(group, name).values()
        if plain_type(key.type) == dict[str, Any]
    }


# --- Hydra's store, whose options a defaults list chooses ---------------------------------------------------------


def _option(chosen: Component) -> str:
    """Name of a nested default in Hydra's store; one with settings of its own is an option of its own."""
    return chosen.name + "".join(f"__{key}_{value}" for key, value in chosen.settings.items())


def _nested(chosen: Component) -> dict[str, Component]:
    """The keys of a component that hold another one, with the one that is the default."""
    keys = keys_of(chosen.group, chosen.name)
    return {name: key.default for name, key in keys.items() if isinstance(key.default, Component)}


def _store_options(place: str, group: str, *others: Component) -> None:
    """Store every component of `group` as an option at `place`, and the groups nested in them below it."""
    for chosen in [*(Component(group, name) for name in describe_components().get(group, {})), *others]:
        _store_later(_option(chosen), partial(_option_node, chosen), place)
        for key, default in _nested(chosen).items():
            _store_options(f"{place}/{key}", default.group, *([default] if default.settings else []))


def _option_node(chosen: Component) -> DictConfig:
    # The component's own values first, then the nested components' schemas take their places.
    defaults: list[Any] = ["_self_", *({key: _option(default)} for key, default in _nested(chosen).items())]
    with_defaults = dataclasses.make_dataclass(
        f"{chosen.group}__{chosen.name}",
        [("defaults", list[Any], dataclasses.field(default_factory=lambda: defaults))],
        bases=(component_schema(chosen.group, chosen.name),),
    )
    try:
        return OmegaConf.structured(with_defaults(**chosen.settings))
    except (TypeError, OmegaConfBaseException) as error:
        raise UserError(f"{chosen.group} {chosen.name}: its signature cannot be a schema ({error}).") from error


_structured = cache(OmegaConf.structured)


class _Later(ConfigNode):
    """A config of Hydra's store that is made on demand: a run uses twenty of a hundred."""

    def __init__(self, name: str, make: Callable[[], DictConfig], group: str | None) -> None:
        self.name, self.group, self.package, self.provider = name, group, None, None
        self.make = cache(make)

    def __getattr__(self, name: str) -> Any:
        if name != "node":
            raise AttributeError(name)
        return self.make()  # of which Hydra takes a copy


def _store_later(name: str, make: Callable[[], DictConfig], group: str | None = None) -> None:
    place = ConfigStore.instance().repo
    for folder_name in group.split("/") if group else ():
        place = place.setdefault(folder_name, {})
    place[f"{name}.yaml"] = _Later(f"{name}.yaml", make, group)


def store_components() -> None:
    """Fill Hydra's store with the schemas and with every component, those of a user (--import) included."""
    schema: Any
    for recipe, schema in SCHEMAS.items():
        _store_later(f"{recipe}_schema", partial(_structured, plain_schema(schema)))
    components = frozenset((group, name) for group, table in describe_components().items() for name in table)
    _store_groups(frozenset(component_keys()), components)


@cache
def _store_groups(groups: frozenset[str], components: frozenset[tuple[str, str]]) -> None:
    """Once for each set of keys and components."""
    for group in sorted(groups):
        _store_options(group, group)
