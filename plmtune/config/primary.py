"""The config files of a run: found, checked, and put together as Hydra's primary config."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plmtune.config.builtin import builtin_folder
from plmtune.config.choices import choices_of, normalize_file
from plmtune.config.messages import Given, unknown_key
from plmtune.config.names import name_hint, refuse_preset
from plmtune.config.override_checks import chosen_components
from plmtune.config.rules import check_file, read_yaml
from plmtune.config.schema import SCHEMAS, component_keys
from plmtune.config.signatures import dict_group, is_component, plain_schema
from plmtune.errors import UserError, did_you_mean, either, near_names, refuse_pipe
from plmtune.registry import Component, describe_components, keys_of

PRIMARY = "plmtune_primary"

_OUR_SCHEMAS, _OUR_GROUPS = dict(SCHEMAS), component_keys()  # without what a user's recipe adds
# Recipe -> the config that a user's own file builds on, where it has another name than its recipe.
_BASES = {"preference": "dpo"}


def find_config(name: str) -> Path:
    """Path of a built-in config by name (``pretrain``) or of a file (``mine.yaml``, ``conf/plm_1.8b.yaml``)."""
    builtin = builtin_folder("conf")
    configs = [path.stem for path in builtin.glob("*.yaml")]
    if name.endswith((".yaml", ".yml")):
        # conf/NAME.yaml names the built-in file from any directory, as the documentation writes it.
        for path in (Path(name), *([builtin / name.removeprefix("conf/")] if name.startswith("conf/") else [])):
            if path.is_file():
                return path
        beside = {path.stem: str(path) for path in Path(name).parent.glob("*.y*ml")}
        near = [beside[stem] for stem in near_names(Path(name).stem, beside)]
        hint = f" Did you mean {either(near)}?" if near else did_you_mean(Path(name).stem, configs)
        refuse_pipe(Path(name))
        raise UserError(f"{name}: no such file.{hint}")
    path = builtin / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"There is no config {name}.{name_hint(name) or did_you_mean(name, configs)}")
    return path


def store_primary(name: str, overlays: Sequence[str], overrides: Sequence[str], checked: Sequence[str]) -> Given:
    """Put the primary config into Hydra's store; returns what it is composed of. `checked` are overrides as Hydra's."""
    files = [find_config(name), *map(find_config, overlays)]
    contents = [read_yaml(path) for path in files]
    for path, content in zip(files, contents, strict=True):
        check_file(content, path)
        recipe = content.get("recipe", "pretrain")
        if recipe not in list(SCHEMAS):  # a list: what YAML holds may have no hash
            raise UserError(f"{path}, key recipe: there is no {recipe!s:.80}.{did_you_mean(str(recipe), SCHEMAS)}")
        refuse_preset(content, path)
    recipe = contents[0]["recipe"] if "recipe" in contents[0] else _recipe_of(contents[0], files[0])
    for path, content in zip(files, contents, strict=True):
        if (theirs := content.get("recipe", recipe)) != recipe:
            raise UserError(
                f"{path}, key recipe: the file is for {theirs}, and {name} runs {recipe}. "
                f"Use it as in plmtune run {_BASES.get(theirs, theirs)} {path}, or remove the key."
            )
    base = str(_BASES.get(recipe, recipe))
    # Whether it names its schema, as built-in configs and their copies do. Other configs extend one of them.
    listed = contents[0].get("defaults")
    whole = isinstance(listed, list) and any(isinstance(e, str) and e.endswith("_schema") for e in listed)
    is_builtin = files[0].resolve().parent == builtin_folder("conf").resolve()
    named = files[0].stem if is_builtin else base
    if whole and is_builtin:
        base, files, contents, whole = files[0].stem, files[1:], contents[1:], False
    store = ConfigStore.instance()
    keys = [f"plmtune_overlay_{index}" for index in range(len(files))]
    given = Given(overrides, dict(zip(keys, files, strict=True)), dict(zip(keys, contents, strict=True)), base, named)
    for path, content in zip(files, contents, strict=True):
        _check_shape(SCHEMAS[recipe], content, "", f"{path}, ")
    later = chosen_components(checked)
    for index, (key, path) in reversed([*enumerate(given.files.items())]):
        normal = normalize_file(given.contents[key], path, base=whole and not index, later=later)
        later = {**choices_of(normal), **later}
        store.store(name=key, node=OmegaConf.create(normal))
    # An overlay may ask for other components, so it is merged after the base but its choices hold from the start.
    # Groups that a user's schema adds are chosen nowhere yet.
    added = {f.name for f in dataclasses.fields(SCHEMAS[recipe])} & component_keys() - _OUR_GROUPS
    bases = [*([] if whole else [base]), *({group: None} for group in sorted(added))]
    store.store(name=PRIMARY, node={"defaults": [*bases, *given.files, "_self_"]})
    return given


def _check_shape(annotation: Any, value: Any, key: str, place: str) -> None:
    """Refuse a table in place of a list and the reverse; OmegaConf's own error names no key."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if (group := dict_group(annotation)) and isinstance(value, dict):
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
            if is_component(hints.get(name)):
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
    known = list(describe_components()[group])
    names = [value["component"]] if value.get("component") in known else known
    for name, child in value.items():
        held = next((keys_of(group, one)[name] for one in names if name in keys_of(group, one)), None)
        if held is not None and isinstance(held.default, Component):
            _check_shape_of_component(held.default.group, child, f"{key}.{name}", place)
        elif held is not None:
            _check_shape(held.type, child, f"{key}.{name}", place)


def _recipe_of(content: dict[str, Any], path: Path) -> str:
    """The recipe of a file that does not name it: the only one that has its keys."""
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


def use_schema(name: str, schema: Any, where: str) -> None:
    """Check and compose configs of a recipe by a user's own schema, which adds keys to ours.

    Args:
        name: the config that the user's recipe starts from (its CONFIG).
        schema: a dataclass that extends the schema of that config's recipe.
        where: the user's recipe file, for messages.
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
        OmegaConf.structured(plain_schema(schema))
    except (NameError, TypeError, OmegaConfBaseException) as error:
        raise UserError(f"{where}: Config cannot be a schema ({str(error).splitlines()[0]:.200}).") from error
    SCHEMAS[recipe] = schema
