"""Plain values of a config, checked against schema and signatures, as typed objects; and back, as a run saves them."""

from __future__ import annotations

import dataclasses
import logging
import math
import types
import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plmtune.config.choices import group_at, take_choices
from plmtune.config.messages import TYPES, in_words, of_other_component, unknown_key
from plmtune.config.override_checks import check_overrides, parse
from plmtune.config.overrides import hydra_literal
from plmtune.config.renamed import with_new_keys
from plmtune.config.rules import check_scalar, check_value, read_yaml, resolve
from plmtune.config.schema import SCHEMAS
from plmtune.config.signatures import FIELDS, component_schema, dict_group, is_component, is_text_list, plain_schema
from plmtune.errors import UserError, did_you_mean, either
from plmtune.ranges import Rule
from plmtune.registry import Component, describe_components, find, keys_of


def from_plain(source: DictConfig | dict[str, Any], where: str = "") -> Any:
    """Check plain values against a recipe's schema and its components' signatures; give the typed config."""
    place = f"{where}, " if where else ""
    plain = typing.cast(
        "dict[str, Any]", OmegaConf.to_container(source, resolve=False) if isinstance(source, DictConfig) else source
    )
    plain = resolve(plain, place)
    check_value(plain, place)
    recipe = plain.get("recipe")
    if not isinstance(recipe, str) or recipe not in SCHEMAS:
        raise UserError(f"{where or 'config'}, key recipe: there is no {recipe}.{did_you_mean(str(recipe), SCHEMAS)}")
    schema: Any = SCHEMAS[recipe]
    return _construct(schema, merge(plain_schema(schema), plain, "", place), "", place)


_structured = cache(OmegaConf.structured)


def merge(schema: Any, values: dict[str, Any], key: str, place: str) -> dict[str, Any]:
    try:
        merged = OmegaConf.merge(_structured(schema), values)
    except OmegaConfBaseException as error:
        full = ".".join(part for part in (key, str(getattr(error, "full_key", "") or "")) if part)
        if "not in" in str(error):
            inner = getattr(error, "object_type", None) or schema  # the section that lacks the key
            known = FIELDS.get(inner.__name__, [f.name for f in dataclasses.fields(schema) if f.name != "component"])
            group, _, name = inner.__name__.partition("__")
            if hint := of_other_component(full, group, name):
                raise UserError(f"{place}key {full}: {hint}") from None
            raise unknown_key(place, full, known) from None
        said = in_words(str(error)) or str(error).splitlines()[0]
        raise UserError(f"{place}key {full}: {said:.300}.") from None
    return typing.cast("dict[str, Any]", OmegaConf.to_container(merged))


def _construct(annotation: Any, value: Any, key: str, place: str) -> Any:
    """Turn a checked plain value into what its annotation says: dataclasses, Components, Literals, tuples."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if is_text_list(annotation) and not isinstance(value, dict):
        value = _texts(value, f"{place}key {key}")
    if value is None:
        return None
    if isinstance(value, int):  # from a text, which OmegaConf made a number
        check_scalar(value, place, key)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{place}key {key}: must be a finite number, not {value}.")
    if is_component(annotation):
        return _to_component(key.rpartition(".")[2], value, key, place)
    if isinstance(value, dict | list) and not _may_hold(annotation, type(value)):
        held = "a table" if isinstance(value, dict) else "a list"
        raise UserError(f"{place}key {key}: {held} where one value is needed ({_kind(annotation)}).")
    if group := dict_group(annotation):
        return {name: _to_component(group, child, f"{key}.{name}", place) for name, child in value.items()}
    if origin is typing.Annotated:
        for rule in arguments[1:]:
            if isinstance(rule, Rule) and not rule.allows(value):
                raise UserError(f"{place}key {key}: {rule}, not {value!r:.80}.")
        return _construct(arguments[0], value, key, place)
    if origin is Literal and value not in arguments:
        raise UserError(f"{place}key {key}: {value!r} is none of {', '.join(map(str, arguments))}.")
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation, include_extras=True)
        dotted = f"{key}." if key else ""
        section = typing.cast(Any, annotation)(
            **{name: _construct(hints[name], child, dotted + name, place) for name, child in value.items()}
        )
        if hasattr(section, "check"):  # what one key asks of another
            try:
                section.check()
            except ValueError as error:
                named = f"key {key}: " if key else "key "  # of the whole config the message begins with the key
                raise UserError(f"{place}{named}{str(error).rstrip('.')}.") from error
        return section
    if origin is list:
        return [_construct(arguments[0], child, f"{key}[{i}]", place) for i, child in enumerate(value)]
    if origin is dict:
        return {name: _construct(arguments[1], child, f"{key}.{name}", place) for name, child in value.items()}
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) != len(kinds):
            raise UserError(f"{place}key {key}: needs {len(kinds)} values, not {len(value)}.")
        items = enumerate(zip(kinds, value, strict=True))
        return tuple(_construct(kind, child, f"{key}[{i}]", place) for i, (kind, child) in items)
    if origin in (typing.Union, types.UnionType):
        others = [argument for argument in arguments if argument is not type(None)]
        return _construct(others[0], value, key, place) if len(others) == 1 else value
    return value


def _texts(value: Any, place: str) -> list[Any]:
    """The items of a list of texts; a single text stands for a list of one."""
    if value is None:
        raise UserError(f"{place}: needs a list of texts, not null. An empty one is [].")
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if not isinstance(item, str | list | dict):
            held = hydra_literal(item)
            raise UserError(f"{place}: {held} is no text. Put it in quotes, inside of the shell's: '[\"{held}\"]'.")
    return list(items)


def _may_hold(annotation: Any, kind: type) -> bool:
    """Whether a key of this type takes a table (dict) or a list."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or dataclasses.is_dataclass(annotation) or is_component(annotation):
        return True
    if origin in (typing.Annotated, typing.Union, types.UnionType):  # of Annotated the rest are rules
        return any(_may_hold(a, kind) for a in (arguments[:1] if origin is typing.Annotated else arguments))
    return origin is dict if kind is dict else origin in (list, tuple)


def _kind(annotation: Any) -> str:
    """A key's type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation) or (annotation,)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return either([str(value) for value in arguments])
    if is_text_list(annotation):
        return "a list of texts"
    return either([TYPES.get(getattr(argument, "__name__", ""), str(argument)) for argument in arguments])


def _to_component(group: str, value: Any, key: str, place: str) -> Component:
    """Check ``{component: name, setting: ...}`` against the registered signature."""
    if isinstance(value, str):  # the name alone
        value = {"component": value}
    if isinstance(value, dict) and value and "component" not in value:  # as model=null leaves what a file set
        names = ", ".join(f"{key}.{name}" for name in value)
        raise UserError(
            f"{place}key {key}: has no component, and {names} needs one: take it out, or choose {key}=NAME."
        )
    if not isinstance(value, dict) or not isinstance(value.get("component"), str):
        raise UserError(
            f"{place}key {key}: needs the name of a component: {', '.join(sorted(describe_components()[group]))}."
        )
    name = value["component"]
    try:
        find(group, name)
    except UserError as error:
        raise UserError(f"{place}key {key}: {error}") from None
    keys = keys_of(group, name)
    checked = merge(component_schema(group, name), value, key, place)
    del checked["component"]
    settings = {}
    for item, child in checked.items():
        full = f"{key}.{item}"
        default = keys[item].default
        if isinstance(default, Component):
            settings[item] = default if child is None else _to_component(default.group, child, full, place)
        else:
            settings[item] = _construct(keys[item].type, child, full, place)
    return Component(group, name, settings)


def to_plain(value: Any) -> Any:
    """The inverse of `from_plain`: nested dicts, lists and scalars, as written to YAML and JSON."""
    if isinstance(value, Component):
        return {"component": value.name, **{k: to_plain(v) for k, v in value.settings.items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value


def to_yaml(cfg: Any) -> str:
    return yaml.safe_dump(to_plain(cfg), sort_keys=False, allow_unicode=True)


# --- the saved config of a run: read back and changed; nothing is composed again ----------------------------------


def load_config(path: Path) -> Any:
    """Read a resolved ``config.yaml`` back, through the same checks; nothing is composed again.

    Keys that an earlier version named otherwise are read, with a notice.
    """
    content = read_yaml(path)
    schema = SCHEMAS.get(str(content.get("recipe")))
    content, renamed = with_new_keys(content, [f.name for f in dataclasses.fields(schema)] if schema else ())
    if renamed:
        _notice_once(f"{path}: written by an earlier version: {', '.join(renamed)}.")
    return from_plain(content, where=str(path))


@cache
def _notice_once(text: str) -> None:
    """Log a notice once in a process: a run's config is read several times."""
    logging.getLogger(__name__).warning(text)


def override(cfg: Any, overrides: Sequence[str]) -> Any:
    """Change keys of a typed config, with the words and the checks of the command line; nothing is composed again.

    ``key=value`` replaces a value, or merges into a section; ``logger=tensorboard`` chooses another component, with
    its own defaults.
    """
    for text in overrides:
        check_overrides([text])
        parsed = parse(text)
        if parsed.is_delete() or parsed.is_add() or parsed.is_sweep_override() or parsed.package:
            raise UserError(f"override {text}: write key=value, as a saved config has every key and one value of each.")
        value = parsed.value()
        section = to_plain(cfg)
        plain, *above, last = section, *parsed.key_or_group.replace("/", ".").split(".")
        for name in above:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        group = group_at(parsed.key_or_group)
        choices: dict[str, str | None] = {}
        if group and isinstance(value, str | list):
            place = parsed.key_or_group.replace(".", "/")
            settings = take_choices(value, place, group, choices, f"override {text:.200}, ")
            section[last] = {"component": choices[place], **settings}
        elif isinstance(value, dict) and isinstance(section.get(last), dict):
            section[last] = {**section[last], **value}
        else:
            section[last] = value
        cfg = from_plain(plain, where=f"override {text}")
    return cfg
