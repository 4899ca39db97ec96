"""Parts that a model has beyond its checkpoint's, and that change nothing at their start.

A component says what it extends: its `extends(component, settings)` returns the settings with which it starts equal to
another component of its group, or None. Its `added_settings` add a part where they are not None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.errors import UserError, did_you_mean
from plmtune.models.assemble import component_config
from plmtune.registry import Component, describe_components, keys_of, load


def changed(config: Mapping[str, Any], changes: Mapping[str, Any], where: str, group: str = "model") -> dict[str, Any]:
    """The `config` of a model with other settings, as {ffn: siaf, attention: {value_embed: 2}}.

    A component that replaces another one takes over what it extends: the siaf in place of a swiglu has its width.

    Args:
        where: the key of the changes, for messages.

    Raises:
        UserError: for a setting that is not there, or a component that does not extend the present one.
    """
    new = dict(config)
    for key, value in changes.items():
        if key not in config or key in ("component", "vocab_size"):
            known = config.keys() - {"component", "vocab_size"}
            raise UserError(
                f"{where}.{key}: {group} {config['component']} has no such setting.{did_you_mean(key, known)}"
            )
        held = config[key]
        if not isinstance(held, Mapping) or "component" not in held:
            new[key] = value
            continue
        inner = keys_of(group, config["component"])[key].default.group
        settings = {"component": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping):
            raise UserError(f"{where}.{key}: takes the name of a component or a table of settings, not {value!r:.80}.")
        name = str(settings.get("component", held["component"]))
        if name != held["component"]:
            held = _extended(inner, name, held, f"{where}.{key}")
        own = {setting: given for setting, given in settings.items() if setting != "component"}
        new[key] = changed(held, own, f"{where}.{key}", inner)
    return new


def _extended(group: str, name: str, held: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The component `name` in place of another one, which it starts equal to."""
    if name not in (known := describe_components()[group]):
        raise UserError(f"{where}: {group} has no component {name:.80}.{did_you_mean(name, known)}")
    start = _start(group, name, held)
    if start is None:
        plain = [
            f"{key}={value}" for key, value in held.items() if key != "component" and not isinstance(value, Mapping)
        ]
        has = f"{held['component']} ({', '.join(plain)})" if 0 < len(plain) < 5 else held["component"]
        fitting = [one for one in sorted(known) if _start(group, one, held) is not None]
        instead = f" {', '.join(fitting)} does." if fitting else " None does."
        raise UserError(f"{where}: {name} does not start equal to the checkpoint's {has}.{instead}")
    return component_config(Component(group, name, start))


def _start(group: str, name: str, held: Mapping[str, Any]) -> dict[str, Any] | None:
    extends = getattr(load(group, name), "extends", None)
    settings = {key: value for key, value in held.items() if key != "component"}
    found: dict[str, Any] | None = extends(held["component"], settings) if extends else None
    return found


def with_added_parts(
    saved: Mapping[str, Any], own: Mapping[str, Any], group: str = "model", key: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """(the `config` of a checkpoint with the parts that a model adds to it, their names).

    It equals the model's own config unless that differs in more than added parts.

    Args:
        saved, own: configs of the checkpoint and of the model.
    """
    found, names = dict(saved), []
    added = getattr(load(group, saved["component"]), "added_settings", ())
    for name, value in own.items():
        held, place = saved.get(name), f"{key}.{name}" if key else name
        if name in added and held is None and value is not None:
            found[name] = value
            names.append(f"{place}={value}")
        elif isinstance(value, Mapping) and isinstance(held, Mapping) and {"component"} <= value.keys() & held.keys():
            inner = keys_of(group, own["component"])[name].default.group
            if value["component"] == held["component"]:
                found[name], more = with_added_parts(held, value, inner, place)
                names += more
            elif (start := _start(inner, value["component"], held)) is not None:
                found[name] = {**value, **start}
                names.append(f"{place}={value['component']}")
    return found, names
