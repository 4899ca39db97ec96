"""Choices of components as plain values: a name, a list of loggers, a preset file.

Hydra chooses a component by a defaults list or by an override of a group. Users also write ``model: plm_20m``,
``model.ffn=swiglu`` or ``logger: [tensorboard, wandb]``. Each is rewritten to Hydra's form before Hydra reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plmtune.config.builtin import builtin_folder
from plmtune.config.overrides import quote_override
from plmtune.config.rules import check_file, is_option, read_yaml
from plmtune.config.schema import component_keys
from plmtune.errors import UserError, either
from plmtune.registry import Component, describe_components, keys_of

SEVERAL = "several"  # the logger that holds other loggers
FILE_PRESET = "plmtune_file_"  # what the names of presets from files begin with in Hydra's store


def nested_groups(group: str) -> dict[str, str]:
    """Keys of a group's components that hold a component themselves, and the group of each."""
    keys = [key for name in describe_components().get(group, {}) for key in keys_of(group, name).values()]
    return {key.name: key.default.group for key in keys if isinstance(key.default, Component)}


def group_at(place: str) -> str | None:
    """The group of the component at a place, with dots or slashes: ``model/ffn`` -> ``ffn``."""
    first, *rest = re.split(r"[./]", place)
    group = first if first in component_keys() else None
    for part in rest:
        group = nested_groups(group).get(part) if group else None
    return group


def take_choices(value: Any, place: str, group: str, choices: dict[str, str | None], where: str) -> Any:
    """Return the settings in a component's value; the names in it are added to `choices` by their place.

    Args:
        place: of the component, with slashes.
        where: file or override, in front of a message.
    """
    key = place.replace("/", ".")
    if isinstance(value, list) and group != "logger":
        several = quote_override("data.sources", {"NAME": {"component": "files", "paths": ["a.txt"]}})
        hint = f" Several sources are data=mix with {several}." if key == "data" else ""
        raise UserError(f"{where}key {key}: takes the name of one component, not a list.{hint}")
    if isinstance(value, list):
        if len(value) != 1:
            choices[place] = SEVERAL
            return {"loggers": _several(value, f"{where}key {key}: ")}
        (value,) = value
    rest = dict(value) if isinstance(value, dict) else {"component": value}
    if "component" in rest:
        name = rest.pop("component")
        if isinstance(name, str) and name.endswith((".yaml", ".yml")):
            raise UserError(f"{where}key {key}: {name} is a file. Give it on the command line: {place}={name}")
        if not isinstance(name, str) or not is_option(name):
            raise UserError(f"{where}key {key}: {name!r:.80} is no name of a component. See: plmtune ls {group}")
        choices[place] = name
    for child, nested in nested_groups(group).items():
        if rest.get(child) is not None:
            rest[child] = take_choices(rest[child], f"{place}/{child}", nested, choices, where)
            if rest[child] == {}:
                del rest[child]
    return rest


def _several(items: Sequence[Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        settings = {"component": item} if isinstance(item, str) else item
        if not isinstance(settings, dict) or not isinstance(settings.get("component"), str):
            form = quote_override("logger", ["tensorboard", {"component": "wandb", "project": "x"}])
            raise UserError(f"{where}{item!r:.80} is no logger. Write {form}.")
        name = settings["component"]
        if name in found:
            raise UserError(f"{where}names {name} twice.")
        found[name] = settings
    return found


def normalize_file(
    content: Mapping[str, Any], path: Path, *, base: bool = False, later: Mapping[str, str | None]
) -> dict[str, Any]:
    """Move the choices in a file's values to its defaults list, where Hydra looks for them.

    Settings that stand beside the name of their component, or are a list of loggers, go with it where a later file or
    an override chooses another one.

    Args:
        base: the file is a copy of a built-in config that others build on; else it overrides what it builds on.
        later: what is chosen after this file, by place.
    """
    choices: dict[str, str | None] = {}
    values: dict[str, Any] = {}
    groups = component_keys()
    for key, value in content.items():
        if key not in groups:
            values[key] = value
        elif value in (None, []):  # a choice as any other: a later one may choose again
            choices[key] = None
        else:
            kept = _without_replaced(take_choices(value, key, key, choices, f"{path}, "), key, choices, later)
            if kept or value == {}:
                values[key] = kept
    if "defaults" in values and not base:  # a copy of a built-in config is an overlay too
        entries = [entry for entry in values["defaults"] if not str(entry).endswith("_schema")]
        values["defaults"] = [
            {f"override /{key.lstrip('/')}": entry[key] for key in entry}
            if isinstance(entry, dict) and not any(" " in key for key in entry)
            else entry
            for entry in entries
        ]
        values["defaults"].sort(key=lambda entry: isinstance(entry, dict))  # Hydra wants overrides last
    return _with_choices(values, choices, path, "/")


def _without_replaced(
    values: Any, place: str, choices: dict[str, str | None], later: Mapping[str, str | None]
) -> dict[str, Any]:
    """The settings of a component without what belongs to components that give way to later ones, nor their names."""
    if place in choices and place in later and (later[place] != choices[place] or choices[place] == SEVERAL):
        for at in [at for at in choices if at == place or at.startswith(f"{place}/")]:
            del choices[at]
        return {}
    return {
        key: _without_replaced(child, f"{place}/{key}", choices, later) if isinstance(child, dict) else child
        for key, child in values.items()
    }


def _place(key: str) -> str:
    """The place in a key of a defaults list: ``override /model/ffn`` -> ``model/ffn``."""
    return key.split()[-1].lstrip("/")


def choices_of(values: Mapping[str, Any]) -> dict[str, str | None]:
    """What the defaults list of a file chooses, by place."""
    entries = [entry for entry in values.get("defaults", []) if isinstance(entry, dict)]
    return {_place(key): name for entry in entries for key, name in entry.items()}


def _with_choices(values: dict[str, Any], choices: dict[str, str | None], path: Path, root: str) -> dict[str, Any]:
    """Add choices to the defaults list; one that is null there gives way in its place."""
    left, entries = dict(choices), []
    for entry in values.get("defaults", []):
        entry = dict(entry) if isinstance(entry, dict) else entry
        for key, listed in entry.items() if isinstance(entry, dict) else ():
            place = _place(key)
            entry[key] = name = left.pop(place, listed)
            if listed not in (None, name):
                raise UserError(
                    f"{path}, key {place.replace('/', '.')}: {name or 'null'} is chosen here, and {listed} in the "
                    "defaults list. Keep one of them."
                )
        entries.append(entry)
    entries += [{f"override {root}{place}": name} for place, name in left.items()]
    return {**values, "defaults": entries} if choices else values


# --- presets ------------------------------------------------------------------------------------------------------


def presets(group: str) -> list[str]:
    """Names of the presets of a group, also where it is nested in others."""
    conf = builtin_folder("conf")
    return sorted({path.stem for path in [*conf.glob(f"{group}/*.yaml"), *conf.glob(f"*/{group}/*.yaml")]})


def preset_groups(content: Mapping[str, Any]) -> list[str]:
    """The groups that a file is a preset of; empty if it is a config.

    A preset starts from a component or another preset, by a plain name in its defaults list or by `component`.
    """
    defaults = content.get("defaults")
    names = [entry for entry in defaults if isinstance(entry, str)] if isinstance(defaults, list) else []
    names = [content["component"]] if "component" in content else names
    if "recipe" in content or any((builtin_folder("conf") / f"{name}.yaml").is_file() for name in names):
        return []
    return [
        group for group, table in describe_components().items() if any(n in table or n in presets(group) for n in names)
    ]


def place_of_group(group: str) -> str:
    """Where a group's component is chosen: ``ffn`` -> ``model/ffn``."""
    groups = component_keys()
    if group in groups:
        return group
    owners = [owner for owner in sorted(groups) if group in nested_groups(owner).values()]
    key = next((key for key, nested in nested_groups(owners[0]).items() if nested == group), group) if owners else group
    return f"{owners[0]}/{key}" if owners else group


def read_preset(path: Path, place: str, group: str) -> dict[str, Any]:
    """Read a preset of `group` from a file, as Hydra's store holds it."""
    if not path.is_file():
        raise UserError(f"override {place}={path}: no such file. A preset to start from: plmtune ls {group}")
    content = read_yaml(path)
    check_file(content, path)
    found = preset_groups(content)
    if group not in found:
        what = f"is a preset of the group {either(found)}" if found else f"is no preset of the group {group}"
        raise UserError(
            f"override {place}={path}: {path} {what}. A preset of {group} starts with defaults: [NAME], a component "
            f"or preset of plmtune ls {group}"
        )
    choices: dict[str, str | None] = {}
    values = take_choices({k: v for k, v in content.items() if k != "defaults"}, place, group, choices, f"{path}, ")
    base = choices.pop(place, None)
    defaults = [*([base] if base else []), *content.get("defaults", [])]
    if not any(isinstance(entry, str) and entry != "_self_" for entry in defaults):
        raise UserError(f"{path}: says no component that its keys belong to. Add defaults: [NAME, _self_].")
    relative = {at.removeprefix(f"{place}/"): name for at, name in choices.items()}
    return _with_choices({**values, "defaults": defaults}, relative, path, "")
