"""Configs: composed by Hydra, typed by signatures, built through the registry.

``compose`` gives a recipe's schema (`plmtune.config.schema`) in which each component stands as a `Component`: a
registered name with its settings. Hydra only merges YAML and overrides here; nothing a config says is ever imported
or called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra import main as hydra_main
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plmtune.config.builtin import builtin_folder
from plmtune.config.choices import FILE_PRESET, SEVERAL, choices_of, group_at, normalize_file, read_preset, take_choices
from plmtune.config.messages import Given, explain, in_words, unknown_key
from plmtune.config.names import refuse_preset, where_it_belongs
from plmtune.config.overrides import as_typed, in_hydras_form
from plmtune.config.renamed import with_new_keys
from plmtune.config.rules import check_file, check_override, check_scalar, check_value, is_option, read_yaml, resolve
from plmtune.config.schema import SCHEMAS, component_keys
from plmtune.errors import UserError, did_you_mean, either, near_names, refuse_pipe
from plmtune.io.atomic import remove_empty_folders
from plmtune.ranges import Rule
from plmtune.registry import Component, Key, describe, find, keys_of

PRIMARY = "plmtune_primary"
_OUR_SCHEMAS, _OUR_GROUPS = dict(SCHEMAS), component_keys()  # without what a user's recipe adds
# The config that a person's own builds on, where it does not bear its recipe's name.
_BASES = {"preference": "dpo"}


# --- signatures and dataclasses as OmegaConf schemas -------------------------------------------------------------


# Type name -> its keys, to find the nearest right one for a wrong one.
_fields: dict[str, list[str]] = {}


def _is_component(annotation: Any) -> bool:
    return annotation is Component or Component in typing.get_args(annotation)


def _dict_group(annotation: Any) -> str | None:
    """The group of ``Annotated[dict[str, Component], "group"]``."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, group = typing.get_args(annotation)[:2]
        if typing.get_args(inner)[1:] == (Component,):
            return str(group)
    return None


def _is_text_list(annotation: Any) -> bool:
    """Whether a key holds a list of texts, for which one text alone stands as well."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _is_text_list(arguments[0])
    return origin in (list, tuple) and (typing.get_args(arguments[0]) or arguments)[0] is str


def _plain(annotation: Any) -> Any:
    """The nearest type that OmegaConf checks: Literal becomes the type of its values, a component Any."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_component(annotation) or _is_text_list(annotation):
        return Any
    if origin is typing.Annotated:
        return dict[str, Any] if _dict_group(annotation) else _plain(arguments[0])
    if origin is Literal:
        return type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_plain(a) for a in arguments)]  # noqa: UP007  (built from values)
    if origin in (list, tuple, dict):
        return origin[tuple(a if a is Ellipsis else _plain(a) for a in arguments)]
    if dataclasses.is_dataclass(annotation):
        return _plain_dataclass(typing.cast(Hashable, annotation))
    return annotation


def _field(key: Key) -> tuple[str, Any, Any]:
    default = None if isinstance(key.default, Component) else key.default
    if isinstance(default, list | dict | tuple):
        return key.name, _plain(key.type), dataclasses.field(default_factory=lambda: default)
    return key.name, _plain(key.type), dataclasses.field(default=default)


@cache
def _plain_dataclass(cls: Hashable) -> Any:
    schema = typing.cast(Any, cls)
    hints = typing.get_type_hints(schema, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(schema):
        kind = _plain(hints[item.name])
        if dataclasses.is_dataclass(hints[item.name]):
            fields.append((item.name, kind, dataclasses.field(default_factory=kind)))
        elif item.default_factory is not dataclasses.MISSING:
            fields.append((item.name, kind, dataclasses.field(default_factory=item.default_factory)))
        else:
            fields.append((item.name, kind, dataclasses.field(default=item.default)))
    _fields[schema.__name__] = [name for name, _, _ in fields]
    return dataclasses.make_dataclass(schema.__name__, fields)


@cache
def _component_dataclass(group: str, name: str) -> Any:
    """The schema of a component: its name under ``component``, then its keys."""
    fields = [
        ("component", str, dataclasses.field(default=name)),
        *map(_field, keys_of(group, name).values()),
    ]
    _fields[f"{group}__{name}"] = [key for key, _, _ in fields[1:]]
    return dataclasses.make_dataclass(f"{group}__{name}", fields)


def _option(chosen: Component) -> str:
    """Name of a nested default in Hydra's store; one with settings of its own is an option of its own."""
    return chosen.name + "".join(f"__{key}_{value}" for key, value in chosen.settings.items())


def _store_group(place: str, group: str) -> None:
    """Store every component of `group` as an option at `place`, and the groups nested in them below it."""
    for name in describe().get(group, {}):
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
        bases=(_component_dataclass(chosen.group, chosen.name),),
    )
    try:
        return OmegaConf.structured(with_defaults(**chosen.settings))
    except (TypeError, OmegaConfBaseException) as error:
        raise UserError(f"{chosen.group} {chosen.name}: its signature cannot be a schema ({error}).") from error


def _schema_node(recipe: str) -> DictConfig:
    return OmegaConf.structured(_plain_dataclass(typing.cast(Hashable, SCHEMAS[recipe])))


class _Later(ConfigNode):
    """A config of Hydra's store that is made when it is asked for: of a hundred, a run takes twenty."""

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


def _store_components() -> None:
    """Fill Hydra's store with the schemas and with every component, those of a user (--import) included."""
    for recipe in SCHEMAS:
        _store_later(f"{recipe}_schema", partial(_schema_node, recipe))
    components = frozenset((group, name) for group, table in describe().items() for name in table)
    _store_groups(frozenset(component_keys()), components)


@cache
def _store_groups(groups: frozenset[str], components: frozenset[tuple[str, str]]) -> None:
    """Once for each set of keys and components."""
    for group in sorted(groups):
        _store_group(group, group)


def use_schema(name: str, schema: Any, where: str) -> None:
    """Check and compose configs of a recipe by a user's own schema, which adds keys to ours.

    Args:
        name: the config that the user's recipe starts from (its CONFIG).
        schema: a dataclass that extends the schema of that config's recipe.
        where: the user's recipe file, for messages.

    Raises:
        UserError: if it is no such dataclass, or a key has no default or a type that a config cannot hold.
    """
    recipe = str(read_yaml(find_config(name)).get("recipe", "pretrain"))
    ours = _OUR_SCHEMAS[recipe]
    if not (isinstance(schema, type) and dataclasses.is_dataclass(schema) and issubclass(schema, ours)):
        raise UserError(
            f"{where}: Config must be a dataclass that extends plmtune.config.schema.{ours.__name__}, the keys of "
            f"{name}."
        )
    bare = [f.name for f in dataclasses.fields(schema) if f.default is f.default_factory is dataclasses.MISSING]
    if bare:
        raise UserError(f"{where}: the key {bare[0]} of Config needs a default.")
    try:
        OmegaConf.structured(_plain_dataclass(typing.cast(Hashable, schema)))
    except (NameError, TypeError, OmegaConfBaseException) as error:
        raise UserError(f"{where}: Config cannot be a schema ({str(error).splitlines()[0]:.200}).") from error
    SCHEMAS[recipe] = schema


# --- composing ---------------------------------------------------------------------------------------------------


def find_config(name: str) -> Path:
    """Path of a built-in config by name (``pretrain``) or of a file (``mine.yaml``, ``conf/plm_1.8b.yaml``).

    Raises:
        UserError: if there is none, with the nearest name.
    """
    builtin = builtin_folder("conf")
    if name.endswith((".yaml", ".yml")):
        # conf/NAME.yaml names the built-in file from any directory, as the documentation writes it.
        for path in (
            Path(name),
            builtin / Path(name).relative_to("conf") if name.startswith("conf/") else None,
        ):
            if path is not None and path.is_file():
                return path
        beside = {path.stem: str(path) for path in Path(name).parent.glob("*.y*ml")}
        near = [beside[stem] for stem in near_names(Path(name).stem, beside)]
        configs = [path.stem for path in builtin.glob("*.yaml")]
        hint = f" Did you mean {either(near)}?" if near else did_you_mean(Path(name).stem, configs)
        refuse_pipe(Path(name))
        raise UserError(f"{name}: no such file.{hint}")
    path = builtin / f"{name}.yaml"
    if not path.is_file():
        hint = where_it_belongs(name) or did_you_mean(name, (p.stem for p in builtin.glob("*.yaml")))
        raise UserError(f"There is no config {name}.{hint}")
    return path


def _is_base(content: dict[str, Any]) -> bool:
    """Whether a config names its schema, as the built-in ones and their copies do; any other builds on one of them."""
    defaults = content.get("defaults")
    return isinstance(defaults, list) and any(isinstance(e, str) and e.endswith("_schema") for e in defaults)


def _store_primary(name: str, overlays: Sequence[str], overrides: Sequence[str], checked: Sequence[str]) -> Given:
    """Put the primary config into Hydra's store; returns what it is composed of.

    Args:
        overrides: as they were typed.
        checked: the same in Hydra's form.
    """
    files = [find_config(name), *map(find_config, overlays)]
    contents = [read_yaml(path) for path in files]
    for path, content in zip(files, contents, strict=True):
        check_file(content, path, component_keys())
        recipe = content.get("recipe", "pretrain")
        if recipe not in list(SCHEMAS):  # a list: what YAML holds may have no hash
            raise UserError(f"{path}, key recipe: there is no {recipe!s:.80}.{did_you_mean(str(recipe), SCHEMAS)}")
        refuse_preset(content, path)
    recipe = contents[0]["recipe"] if "recipe" in contents[0] else _recipe_of(contents[0], files[0])
    for path, content in zip(files[1:], contents[1:], strict=True):
        if content.get("recipe", recipe) != recipe:
            theirs = content["recipe"]
            raise UserError(
                f"{path}, key recipe: the file is for {theirs}, and {name} runs {recipe}. "
                f"Use it as in plmtune run {_BASES.get(theirs, theirs)} {path}, or remove the key."
            )
    base, whole = str(_BASES.get(recipe, recipe)), _is_base(contents[0])
    is_builtin = files[0].resolve().parent == builtin_folder("conf").resolve()
    named = files[0].stem if is_builtin else base
    if whole and is_builtin:
        base, files, contents, whole = files[0].stem, files[1:], contents[1:], False
    store = ConfigStore.instance()
    keys = [f"plmtune_overlay_{index}" for index in range(len(files))]
    given = Given(overrides, dict(zip(keys, files, strict=True)), dict(zip(keys, contents, strict=True)), base, named)
    for path, content in zip(files, contents, strict=True):
        _check_shape(SCHEMAS[recipe], content, "", f"{path}, ")
    later = _chosen(checked)
    for index, (key, path) in reversed([*enumerate(given.files.items())]):
        normal = normalize_file(given.contents[key], path, component_keys(), base=whole and not index, later=later)
        later = {**choices_of(normal), **later}
        store.store(name=key, node=OmegaConf.create(normal))
    # An overlay may ask for other components, so it is merged after the base but its choices hold from the start.
    # Groups that a user's schema adds are chosen nowhere yet.
    added = {f.name for f in dataclasses.fields(SCHEMAS[recipe])} & component_keys() - _OUR_GROUPS
    bases = [*([] if whole else [base]), *({group: None} for group in sorted(added))]
    store.store(name=PRIMARY, node={"defaults": [*bases, *given.files, "_self_"]})
    return given


def _check_shape(annotation: Any, value: Any, key: str, place: str) -> None:
    """Refuse a table where a list belongs, and the other way round: OmegaConf would not say at which key."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if (group := _dict_group(annotation)) and isinstance(value, dict):
        for name, child in value.items():
            _check_shape_of_component(group, child, f"{key}.{name}", place)
    elif origin is typing.Annotated:
        _check_shape(arguments[0], value, key, place)
    elif origin in (list, tuple) and isinstance(value, dict):
        raise UserError(f"{place}key {key}: needs a list, not a table.")
    elif (origin is dict or dataclasses.is_dataclass(annotation)) and not isinstance(value, dict | None):
        raise UserError(f"{place}key {key}: needs a table of its keys, not {value!r:.80}.")
    elif dataclasses.is_dataclass(annotation) and value is not None:
        hints = typing.get_type_hints(annotation, include_extras=True)
        for name, child in value.items():
            full = f"{key}.{name}" if key else name
            if _is_component(hints.get(name)):
                _check_shape_of_component(name, child, full, place)
            elif name in hints:
                _check_shape(hints[name], child, full, place)
    elif origin is list and isinstance(value, list):
        for index, child in enumerate(value):
            _check_shape(arguments[0], child, f"{key}[{index}]", place)


def _check_shape_of_component(group: str, value: Any, key: str, place: str) -> None:
    """The same for the settings of a component, by the first of its group that has them."""
    if not isinstance(value, dict):
        return
    chosen = value.get("component")
    names = [chosen] if chosen in list(describe()[group]) else list(describe()[group])
    for name, child in value.items():
        held = next((keys_of(group, one)[name] for one in names if name in keys_of(group, one)), None)
        if held is not None and isinstance(held.default, Component):
            _check_shape_of_component(held.default.group, child, f"{key}.{name}", place)
        elif held is not None:
            _check_shape(held.type, child, f"{key}.{name}", place)


def _chosen(overrides: Sequence[str]) -> dict[str, str | None]:
    """What overrides in Hydra's form choose, by place."""
    pairs = [text.partition("=") for text in overrides]
    return {
        place.lstrip("+~"): None if place.startswith("~") else name.strip("'\"")
        for place, _, name in pairs
        if "." not in place and name[:1] != "{" and group_at(place.lstrip("+~"), component_keys())
    }


def _recipe_of(content: dict[str, Any], path: Path) -> str:
    """The recipe of a file that does not name it: the only one that has its keys.

    Raises:
        UserError: if several recipes have them, or none.
    """
    keys = [str(key) for key in content if key != "defaults"]
    known = {recipe: {item.name for item in dataclasses.fields(schema)} for recipe, schema in SCHEMAS.items()}
    fitting = [recipe for recipe, names in known.items() if names.issuperset(keys)]
    if len(fitting) == 1:
        return fitting[0]
    for key in keys:
        if not any(key in names for names in known.values()):
            raise unknown_key(f"{path}, ", key, set().union(*known.values()))
    fit = f"its keys fit {', '.join(fitting)}" if fitting else "no recipe has all of its keys"
    names = ", ".join(_BASES.get(recipe, recipe) for recipe in fitting or SCHEMAS)
    raise UserError(
        f"{path}: does not say which recipe it is for, and {fit}. Name a config in front of it ({names}), or write "
        "the key recipe into it."
    )


def _parse(text: str, following: Sequence[str] = ()) -> Override:
    """Parse an override; `following` words may be the rest of it, cut off at its spaces by the shell."""
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError):
        way = _quoted([text, *following])
        hint = f" Quote it for the shell and for Hydra: {way}" if way else " Write key=value, with the value in quotes."
        raise UserError(f"override {text:.200}: cannot be understood.{hint}") from None


def _quoted(words: Sequence[str]) -> str | None:
    """How the override that `words` begin with is typed; None if that cannot be guessed."""
    key, equals, value = words[0].partition("=")
    close = {"[": "]", "{": "}"}.get(value[:1])
    if close and not value.endswith(close):
        ends = [end for end, word in enumerate(words, 1) if word.endswith(close)]
        for end in ends:
            whole = " ".join(words[:end])
            with contextlib.suppress(HydraException, ValueError, RecursionError):
                OverridesParser.create().parse_override(whole)
                return shlex.quote(whole)
        if (ends and "{" in value) or (not ends and (close == "]" or ":" in value)):
            return None
        if ends:
            value = " ".join(words[: ends[0]]).partition("=")[2]
    plain: Any = value
    if value.startswith("[") and value.endswith("]"):
        plain = [part.strip().strip("'\"") for part in value[1:-1].split(",")]
    typed = as_typed(key, plain)
    try:
        parsed = OverridesParser.create().parse_override(shlex.split(typed)[0])
    except (HydraException, ValueError, RecursionError):
        return None
    return typed if equals and len(typed) < 500 and parsed.value() == plain else None


def _plain_value(value: Any) -> Any:
    """A parsed override's value without Hydra's own types: what is swept over becomes a list."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, ChoiceSweep | list):
        return [_plain_value(child) for child in (value.list if isinstance(value, ChoiceSweep) else value)]
    if isinstance(value, dict):
        return {_plain_value(key): _plain_value(child) for key, child in value.items()}
    return value if isinstance(value, str | int | float | None) else None  # ranges, intervals, globs hold no text


def _check_overrides(overrides: Sequence[str], *, multirun: bool = False) -> list[str]:
    """Refuse what is no override, and write choices in Hydra's form.

    Keys may be added to dictionaries, as ``data.sources={mine: ...}`` does.
    """
    checked: list[list[str]] = []  # what each override stands for
    for index, text in enumerate(overrides):
        # Hydra's multirun reads its own options, one of which unpickles a file, among the overrides.
        if ("=" not in text and not text.startswith("~")) or text.startswith("-"):
            before, equals, value = overrides[index - 1].partition("=") if index else ("", "", "")
            way = f" As a part of {before}: {as_typed(before, f'{value} {text}')}" if equals else ""
            raise UserError(f"{text!r:.200} is neither a YAML file nor an override of the form key=value.{way}")
        if text.startswith("="):
            raise UserError(f"override {text:.200}: has no key. Write key=value.")
        if re.match(r"[+~]*recipe\b", text):
            raise UserError(f"override {text:.200}: a config has its recipe. Run another one: plmtune run NAME")
        part = []
        for normal in _normalize(text, _parse(text, overrides[index + 1 :])):
            parsed = _parse(normal)
            check_override(
                text,
                parsed.key_or_group,
                parsed.package,
                _plain_value(parsed._value),
                groups=component_keys(),
                multirun=multirun,
            )
            key, _, value = normal.lstrip("+").partition("=")
            in_dict = any(key == name or key.startswith(f"{name}.") for name in _dict_keys())
            if key.endswith(".component") and not in_dict:
                raise UserError(
                    f"override {text}: choose it as {key.removesuffix('.component').replace('.', '/')}={value}."
                )
            part.append(f"++{normal.lstrip('+')}" if in_dict else normal)
        for place, name in _chosen(part).items():
            checked = [_without(place, name, earlier) for earlier in checked]
        checked.append(part)
    return [text for part in checked for text in part]


def _without(place: str, name: str | None, part: list[str]) -> list[str]:
    """What one override stands for, without the component at a place, which gives way to a later choice of `name`.

    Of the same component the settings stay, as they do between files; several loggers are replaced as a whole.
    """
    if place not in (chosen := _chosen(part)):
        return part
    if chosen[place] == name != SEVERAL:
        return [t for t in part if t.partition("=")[0].lstrip("+~") != place]
    return [t for t in part if not f"{t.partition('=')[0].lstrip('+~').replace('.', '/')}/".startswith(f"{place}/")]


def _normalize(text: str, parsed: Override) -> list[str]:
    """The overrides in Hydra's form that a choice of a component stands for; any other override stays as it is."""
    key = parsed.key_or_group
    group = group_at(key, component_keys()) if parsed.package is None and key else None
    if group is None or parsed.is_sweep_override() or parsed.is_delete() or parsed.is_add():
        return [text]
    place, value = key.replace(".", "/"), _plain_value(parsed._value)
    if value in (None, []):
        if "/" in place:
            raise UserError(f"override {text}: takes the name of a component. See: plmtune ls {group}")
        return [f"~{place}"]
    if isinstance(value, str):
        if value.endswith((".yaml", ".yml")):
            preset = read_preset(Path(value), place, group, component_keys())
            value = FILE_PRESET + re.sub(r"\W", "_", value)
            ConfigStore.instance().store(group=place, name=value, node=OmegaConf.create(preset))
        elif key == place:
            return [text]
        if is_option(value):  # else check_override says what it is
            return [f"{place}={value}"]
    choices: dict[str, str | None] = {}
    settings = take_choices(value, place, group, choices, f"override {text:.200}, ")
    if not choices:
        return [text]
    return [
        *(f"{at}={name}" for at, name in choices.items()),
        *(f"{key}.{name}={in_hydras_form(child)}" for name, child in settings.items()),
    ]


def sweep(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Divide overrides into those of one value and, by key, those of several: a=1,2 and range(), as Hydra has them.

    Returns:
        (plain overrides, {key: its overrides "key=value" of one value each}).

    Raises:
        UserError: naming the override.
    """
    plain: list[str] = []
    swept: dict[str, list[str]] = {}
    for text in overrides:
        _check_overrides([text], multirun=True)
        parsed = _parse(text)
        if not parsed.is_sweep_override():
            plain.append(text)
        elif parsed.is_discrete_sweep():
            key = parsed.get_key_element()
            swept[key] = [f"{key}={value}" for value in parsed.sweep_string_iterator()]
        else:
            raise UserError(f"override {text}: names no single values. Write key=1,2,3 or key=range(1,10,3).")
    return plain, swept


def _dict_keys() -> set[str]:
    """Full keys that hold a dictionary whose names the user chooses."""
    return _dict_keys_of(frozenset(component_keys()))


@cache
def _dict_keys_of(groups: frozenset[str]) -> set[str]:
    return {
        f"{group}.{key.name}"
        for group in groups
        for name in describe().get(group, {})
        for key in keys_of(group, name).values()
        if _plain(key.type) == dict[str, Any]
    }


def compose(name: str, overlays: Sequence[str] = (), overrides: Sequence[str] = ()) -> Any:
    """Compose one run's config.

    Args:
        name: a built-in config (``pretrain``) or a YAML file; one without a base of its own builds on its `recipe`.
        overlays: YAML files, later ones win.
        overrides: Hydra overrides, values (``optimizer.lr=1e-4``) and groups (``model/ffn=swiglu``).

    Returns:
        the recipe's schema, for example `plmtune.config.schema.PretrainConfig`.

    Raises:
        UserError: naming the file or the override, the key, and the nearest right name.
    """
    checked = _check_overrides(overrides)
    _store_components()
    given = _store_primary(name, overlays, overrides, checked)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(builtin_folder("conf")), version_base="1.3"):
            composed = hydra_compose(PRIMARY, overrides=checked)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, given, all_keys, _fields) from None
    try:
        return typed(composed)
    except UserError as error:
        raise given.blamed(error) from None


def all_keys(base: str) -> list[str]:
    """Every full key of a built-in config, for "did you mean"."""
    with initialize_config_dir(str(builtin_folder("conf")), version_base="1.3"):
        return list(_flat(OmegaConf.to_container(hydra_compose(base), resolve=False)))


def _flat(value: Any, prefix: str = "") -> Iterator[str]:
    for key, child in value.items():
        yield f"{prefix}{key}"
        if isinstance(child, dict):
            yield from _flat(child, f"{prefix}{key}.")


def multirun(
    name: str, overlays: Sequence[str], overrides: Sequence[str], task: Callable[[Any], Any], directory: Path
) -> None:
    """Hydra's own multirun: its sweepers and launchers call `task` with each composed config.

    Args:
        directory: where each job gets a run directory, named by its number, unless the config has `run_dir`.

    Raises:
        UserError: of the first job that is refused, naming it. Of jobs that begin no run no folder is left.
    """
    checked = _check_overrides(overrides, multirun=True)
    for text in checked:
        directory = Path(text.removeprefix("hydra.sweep.dir=")) if text.startswith("hydra.sweep.dir=") else directory
    _store_components()
    given = _store_primary(name, overlays, overrides, checked)

    def job(composed: DictConfig) -> Any:
        place = Path(HydraConfig.get().runtime.output_dir)
        try:
            try:
                cfg = typed(composed)
            except UserError as error:
                raise given.blamed(error) from None
            cfg.run_dir = cfg.run_dir or str(place)
            return task(cfg)
        finally:
            with contextlib.suppress(OSError):  # not empty: a run began there
                place.rmdir()

    settings = [
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.job.chdir=false",
        f"hydra.sweep.dir={directory}",
    ]
    from unittest import mock  # imports asyncio

    def result(done: JobReturn) -> Any:
        if done.status is JobStatus.COMPLETED:
            return done._return_value
        if not isinstance(done._return_value, UserError):
            raise done._return_value
        number = done.hydra_cfg.hydra.job.num if done.hydra_cfg else "?"
        own = [text for text in done.overrides or () if text not in checked]
        raise UserError(f"job {number} ({', '.join(own)}): {done._return_value}") from done._return_value

    argv = ["plmtune", "--multirun", *settings, *checked]
    GlobalHydra.instance().clear()
    with (
        remove_empty_folders(directory),
        contextlib.ExitStack() as patched,
    ):
        # Let Hydra raise what happened instead of printing it and leaving with code 1.
        patched.enter_context(mock.patch.dict(os.environ, HYDRA_FULL_ERROR="1"))
        patched.enter_context(mock.patch.object(sys, "argv", argv))
        told = property(result, vars(JobReturn)["return_value"].fset)  # Hydra's own prints what failed, in its words
        patched.enter_context(mock.patch.object(JobReturn, "return_value", told))
        try:
            hydra_main(version_base="1.3", config_path=str(builtin_folder("conf")), config_name=PRIMARY)(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, given, all_keys, _fields) from None
        finally:
            if directory.is_dir() and [path.name for path in directory.iterdir()] == ["multirun.yaml"]:
                (directory / "multirun.yaml").unlink()


# --- from plain values to typed objects --------------------------------------------------------------------------


def typed(source: DictConfig | dict[str, Any], where: str = "") -> Any:
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
    return _construct(schema, _merge(_plain_dataclass(schema), plain, "", where), "", where)


_structured = cache(OmegaConf.structured)


def _merge(schema: Any, values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    try:
        merged = OmegaConf.merge(_structured(schema), values)
    except OmegaConfBaseException as error:
        full = ".".join(part for part in (key, str(getattr(error, "full_key", "") or "")) if part)
        place = f"{where}, " if where else ""
        if "not in" in str(error):
            inner = getattr(error, "object_type", None) or schema  # the section that lacks the key
            known = _fields.get(inner.__name__, [f.name for f in dataclasses.fields(schema) if f.name != "component"])
            raise unknown_key(place, full, known) from None
        said = in_words(str(error)) or str(error).splitlines()[0]
        raise UserError(f"{place}key {full}: {said:.300}.") from None
    return typing.cast("dict[str, Any]", OmegaConf.to_container(merged))


def _construct(annotation: Any, value: Any, key: str, where: str) -> Any:
    """Turn a checked plain value into what its annotation says: dataclasses, Components, Literals, tuples."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    place = f"{where}, " if where else ""
    if _is_text_list(annotation) and not isinstance(value, dict):
        value = _texts(value, f"{place}key {key}")
    if value is None:
        return None
    if isinstance(value, int):  # from a text, which OmegaConf made a number
        check_scalar(value, place, key)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{place}key {key}: must be a finite number, not {value}.")
    if _is_component(annotation):
        return to_component(key.rpartition(".")[2], value, key, where)
    if isinstance(value, dict | list) and not _may_hold(annotation, type(value)):
        held = "a table" if isinstance(value, dict) else "a list"
        raise UserError(f"{place}key {key}: {held} where one value is needed ({_kind(annotation)}).")
    if group := _dict_group(annotation):
        return {name: to_component(group, child, f"{key}.{name}", where) for name, child in value.items()}
    if origin is typing.Annotated:
        for rule in arguments[1:]:
            if isinstance(rule, Rule) and not rule.allows(value):
                raise UserError(f"{place}key {key}: {rule}, not {value!r:.80}.")
        return _construct(arguments[0], value, key, where)
    if origin is Literal and value not in arguments:
        raise UserError(f"{place}key {key}: {value!r} is none of {', '.join(map(str, arguments))}.")
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation, include_extras=True)
        dotted = f"{key}." if key else ""
        section = typing.cast(Any, annotation)(
            **{name: _construct(hints[name], child, dotted + name, where) for name, child in value.items()}
        )
        if hasattr(section, "check"):  # what one key asks of another
            try:
                section.check()
            except ValueError as error:
                named = f"key {key}: " if key else "key "  # of the whole config the message begins with the key
                raise UserError(f"{place}{named}{str(error).rstrip('.')}.") from error
        return section
    if origin is list:
        return [_construct(arguments[0], child, f"{key}[{i}]", where) for i, child in enumerate(value)]
    if origin is dict:
        return {name: _construct(arguments[1], child, f"{key}.{name}", where) for name, child in value.items()}
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) != len(kinds):
            raise UserError(f"{place}key {key}: needs {len(kinds)} values, not {len(value)}.")
        items = enumerate(zip(kinds, value, strict=True))
        return tuple(_construct(kind, child, f"{key}[{i}]", where) for i, (kind, child) in items)
    if origin in (typing.Union, types.UnionType):
        others = [argument for argument in arguments if argument is not type(None)]
        return _construct(others[0], value, key, where) if len(others) == 1 else value
    return value


def _texts(value: Any, place: str) -> list[Any]:
    """The items of a list of texts, which one text alone stands for as well."""
    if value is None:
        raise UserError(f"{place}: needs a list of texts, not null. An empty one is [].")
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if not isinstance(item, str | list | dict):
            held = in_hydras_form(item)
            raise UserError(f"{place}: {held} is no text. Put it in quotes, inside of the shell's: '[\"{held}\"]'.")
    return list(items)


def _may_hold(annotation: Any, kind: type) -> bool:
    """Whether a key of this type takes a table (dict) or a list."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or dataclasses.is_dataclass(annotation) or _is_component(annotation):
        return True
    if origin is typing.Annotated:
        return _may_hold(arguments[0], kind)
    if origin in (typing.Union, types.UnionType):
        return any(_may_hold(argument, kind) for argument in arguments)
    return origin is dict if kind is dict else origin in (list, tuple)


def _kind(annotation: Any) -> str:
    """A key's type in words."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _kind(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is Literal:
        return either([str(value) for value in typing.get_args(annotation)])
    arguments = typing.get_args(annotation) or (annotation,)
    if _is_text_list(annotation):
        return "a list of texts"
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return either([words.get(argument, str(argument)) for argument in arguments])


def to_component(group: str, value: Any, key: str, where: str = "") -> Component:
    """Check ``{component: name, setting: ...}`` against the registered signature.

    Raises:
        UserError: for an unknown component, an unknown setting or a wrong type.
    """
    place = f"{where}, " if where else ""
    if isinstance(value, str):  # the name alone
        value = {"component": value}
    if not isinstance(value, dict) or not isinstance(value.get("component"), str):
        raise UserError(f"{place}key {key}: needs the name of a component: {', '.join(sorted(describe()[group]))}.")
    name = value["component"]
    try:
        find(group, name)
    except UserError as error:
        raise UserError(f"{place}key {key}: {error}") from None
    keys = keys_of(group, name)
    checked = _merge(_component_dataclass(group, name), value, key, where)
    del checked["component"]
    settings = {}
    for item, child in checked.items():
        full = f"{key}.{item}"
        default = keys[item].default
        if isinstance(default, Component):
            settings[item] = default if child is None else to_component(default.group, child, full, where)
        else:
            settings[item] = _construct(keys[item].type, child, full, where)
    return Component(group, name, settings)


def to_plain(value: Any) -> Any:
    """The inverse of `typed`: nested dicts, lists and scalars, as written to YAML and JSON."""
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


def load_config(path: Path) -> Any:
    """Read a resolved ``config.yaml`` back, through the same checks; nothing is composed again.

    Keys that an earlier version named otherwise are read, with a notice.
    """
    content = read_yaml(path)
    schema = SCHEMAS.get(str(content.get("recipe")))
    content, renamed = with_new_keys(content, [f.name for f in dataclasses.fields(schema)] if schema else ())
    if renamed:
        _notice_once(f"{path}: written by an earlier version: {', '.join(renamed)}.")
    return typed(content, where=str(path))


@cache
def _notice_once(text: str) -> None:
    """Log a notice once in a process: a run's config is read several times."""
    logging.getLogger(__name__).warning(text)


def override(cfg: Any, overrides: Sequence[str]) -> Any:
    """Change keys of a typed config, with the words and the checks of the command line; nothing is composed again.

    ``key=value`` replaces a value, or merges into a section; ``logger=tensorboard`` chooses another component, with
    its own defaults.

    Raises:
        UserError: naming the override.
    """
    for text in overrides:
        _check_overrides([text])
        parsed = _parse(text)
        if parsed.is_delete() or parsed.is_add() or parsed.is_sweep_override() or parsed.package:
            raise UserError(f"override {text}: write key=value, as a saved config has every key and one value of each.")
        value = parsed.value()
        section = to_plain(cfg)
        plain, *above, last = section, *parsed.key_or_group.replace("/", ".").split(".")
        for name in above:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        group = group_at(parsed.key_or_group, component_keys())
        choices: dict[str, str | None] = {}
        if group and isinstance(value, str | list):
            place = parsed.key_or_group.replace(".", "/")
            settings = take_choices(value, place, group, choices, f"override {text:.200}, ")
            section[last] = {"component": choices[place], **settings}
        elif isinstance(value, dict) and isinstance(section.get(last), dict):
            section[last] = {**section[last], **value}
        else:
            section[last] = value
        cfg = typed(plain, where=f"override {text}")
    return cfg


def build(key: str, chosen: Component | None, **runtime: Any) -> Any:
    """Call a component; impossible numbers come back with the key in front.

    Raises:
        UserError: if nothing is chosen for the key, or the component refuses its settings.
    """
    if chosen is None:
        raise UserError(f"key {key}: no component chosen. See: plmtune ls {key}")
    try:
        return chosen(**runtime)
    except ValueError as error:
        raise UserError(f"key {key}: {error}") from error
