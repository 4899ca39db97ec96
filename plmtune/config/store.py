"""Hydra's config store: the schemas of recipes and components, as options that a defaults list can choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plmtune.config.schema import SCHEMAS, component_keys
from plmtune.config.signatures import component_schema, plain_schema
from plmtune.errors import UserError
from plmtune.registry import Component, describe_components, keys_of


def _option(chosen: Component) -> str:
    """Name of a nested default in Hydra's store; one with settings of its own is an option of its own."""
    return chosen.name + "".join(f"__{key}_{value}" for key, value in chosen.settings.items())


def _store_group(place: str, group: str) -> None:
    """Store every component of `group` as an option at `place`, and the groups nested in them below it."""
    for name in describe_components().get(group, {}):
        _store_option(place, Component(group, name))


def _nested(chosen: Component) -> dict[str, Component]:
    """The keys of a component that hold another one, with the one that is the default."""
    keys = keys_of(chosen.group, chosen.name)
    return {name: key.default for name, key in keys.items() if isinstance(key.default, Component)}


def _store_option(place: str, chosen: Component) -> None:
    _store_later(_option(chosen), partial(_option_node, chosen), place)
    for key, default in _nested(chosen).items():
        _store_group(f"{place}/{key}", default.group)
        if default.settings:
            _store_option(f"{place}/{key}", default)


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
    for recipe in SCHEMAS:
        schema: Any = SCHEMAS[recipe]
        _store_later(f"{recipe}_schema", partial(OmegaConf.structured, plain_schema(schema)))
    components = frozenset((group, name) for group, table in describe_components().items() for name in table)
    _store_groups(frozenset(component_keys()), components)


@cache
def _store_groups(groups: frozenset[str], components: frozenset[tuple[str, str]]) -> None:
    """Once for each set of keys and components."""
    for group in sorted(groups):
        _store_group(group, group)
