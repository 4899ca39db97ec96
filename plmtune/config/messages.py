"""Translates errors of Hydra and OmegaConf: which file or override, which key, and what to write instead."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from plmtune.config.builtin import builtin_folder
from plmtune.config.choices import FILE_PRESET, group_at
from plmtune.config.names import name_hint
from plmtune.config.override_checks import chosen_components
from plmtune.config.overrides import quote_override
from plmtune.config.renamed import new_key
from plmtune.config.schema import SCHEMAS
from plmtune.config.signatures import FIELDS
from plmtune.errors import UserError, did_you_mean, either, near_names
from plmtune.registry import describe_components, keys_of
from plmtune.units import with_point

# Files of Hydra's command line and logging, which compose() does not use; reading them takes a tenth of its time.
UNUSED = [f"~hydra/{name}" for name in ("help", "hydra_help", "job_logging", "hydra_logging", "output", "env")]


def of_other_component(full_key: str, group: str, name: str) -> str | None:
    """Hint for a key that the chosen component lacks and others of its group have."""
    parent, _, leaf = full_key.rpartition(".")
    table = describe_components().get(group, {})
    having = [other for other, held in table.items() if any(p.name == leaf and p.default for p in held.parameters)]
    if name not in table or not having:
        return None
    # A loss of pairs is replaced by another loss of pairs first.
    having.sort(key=lambda other: (table[other].returns != table[name].returns, other))
    choice = f"{parent.replace('.', '/')}={having[0]} {full_key}=..."
    return (
        f"{parent} is {name}, which has no key {leaf}; components of {group} that have it: "
        f"{', '.join(having)} ({choice})"
    )


# Keys of the recipes that train, and what quantize calls the same.
_SAME = {"init_from": ["checkpoint"], "runtime": ["device", "dtype"]}


def _of_other_recipe(
    key: str, name: str, keys: Sequence[str], everywhere: Callable[[], Iterable[str]] = list
) -> str | None:
    """Hint for a key that the config's recipe lacks and other recipes have."""
    having = [recipe for recipe, schema in SCHEMAS.items() if any(item.name == key for item in fields(schema))]
    if name in having:
        return f"{key} of {name} is a section, not a component: give its keys, {key}.KEY=VALUE"
    if not having:
        return None
    same = [other for other in _SAME.get(key, ()) if other in keys]
    same = same or [other for other in everywhere() if other.endswith(f".{key}")]
    near = f" Did you mean {either(same)}?" if same else did_you_mean(key, keys)
    return f"{name} has no key {key} (it belongs to {', '.join(having)}).{near if near.endswith('?') else ''}"


def unknown_key(
    place: str, full_key: str, siblings: Iterable[str], everywhere: Callable[[], Iterable[str]] = list
) -> UserError:
    """An unknown key, with the nearest ones beside it, or the same name elsewhere in the config."""
    if renamed := new_key(full_key):
        return UserError(f"{place}key {full_key}: unknown. Did you mean {renamed}?")
    parent, _, leaf = full_key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    near = [prefix + name for name in near_names(leaf, siblings)]
    near = near or [key for key in everywhere() if key.rpartition(".")[2] == leaf and key != full_key][:3]
    known = sorted(siblings)
    none = f"{parent} has no component. Choose one first: {parent}=NAME (plmtune ls {parent})"
    hint = f"Did you mean {either(near)}?" if near else f"Known: {', '.join(known)}." if known else none
    return UserError(f"{place}key {full_key}: unknown. {hint}")


@dataclass(frozen=True)
class Given:
    """The sources of a config, to name where a value comes from."""

    overrides: Sequence[str]  # as typed on the command line
    files: Mapping[str, Path]  # name in Hydra's store -> the file it came from
    contents: Mapping[str, Mapping[str, Any]]  # the same name -> the keys and values of that file
    base: str  # the built-in config that everything builds on
    name: str  # the built-in config that was named, else base

    def override(self, key: str) -> str | None:
        """The override that gives the value of a full key, alone or as a part of its table or list."""
        wanted = key.replace("/", ".")
        for text in reversed(self.overrides):
            name, _, value = text.lstrip("+~").partition("=")
            name = name.split("@")[0].replace("/", ".")
            inside = value.lstrip()[:1] in ("[", "{") and wanted.startswith((f"{name}.", f"{name}["))
            # An unknown section comes from the override that names a key in it.
            if name and wanted and (wanted == name or inside or name.startswith(f"{wanted}.")):
                return text
        return None

    def place(self, key: str) -> str:
        """``override X, `` or ``FILE, `` where the value of a full key is given; empty if nowhere."""
        if override := self.override(key):
            return f"override {override:.200}, "
        parts = re.findall(r"[^.\[\]/]+", key)
        for name in reversed([*self.files]):
            value: Any = self.contents.get(name)
            for part in parts:
                value = value.get(part) if isinstance(value, Mapping) else value
                if value is None:
                    break
            else:
                if parts:
                    return f"{self.files[name]}, "
        return ""

    def with_place(self, error: UserError) -> UserError:
        """The same error with the place of its key in front."""
        key = re.match(r"key ([\w.\[\]-]+):", str(error))
        return UserError(f"{self.place(key[1])}{error}") if key else error


@cache
def _all_keys(base: str, schemas: frozenset[type]) -> list[str]:
    """Every full key of a built-in config, for "did you mean"; again for each set of schemas."""

    def flat(value: Any, prefix: str = "") -> Iterator[str]:
        for key, child in value.items():
            yield f"{prefix}{key}"
            if isinstance(child, dict):
                yield from flat(child, f"{prefix}{key}.")

    with initialize_config_dir(str(builtin_folder("conf")), version_base="1.3"):
        return list(flat(OmegaConf.to_container(hydra_compose(base, overrides=UNUSED), resolve=False)))


def _chosen_keys(overrides: Sequence[str]) -> list[str]:
    """Full keys of the components that overrides choose, as loss.temperature of loss=forward_kl."""
    known = describe_components()
    return [
        f"{place}.{key}"
        for place, name in chosen_components(overrides).items()
        if (group := group_at(place)) and name in known.get(group, {})
        for key in keys_of(group, name)
    ]


def explain(error: Exception, given: Given) -> UserError:
    """Translate an error of Hydra's composition."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(chain)
    full_key = _search(r"full_key: (\S+)", text)
    files, base = given.files, given.base

    def place(key: str) -> str:
        merged = given.override(_search(r"Error merging override [+~]*([\w./-]+)=", text) or "")
        if merged:
            return f"override {merged:.200}, "
        stored = _search(r"In '([^']+)'", text)
        if stored and FILE_PRESET in stored:
            return f"{str(given.override(stored.rpartition('/')[0])).partition('=')[2]}, "
        if stored is not None and stored in files:
            return f"{files[stored]}, "
        return given.place(key) or f"conf/{stored or base}.yaml, "

    if missing := re.search(r"Could not find '([^']+)'", text):
        group, _, option = missing[1].rpartition("/")
        known = re.findall(r"^\t(\S+)$", text.split("Config search path")[0], re.MULTILINE)
        known = [name for name in known if not name.startswith(FILE_PRESET) and "__" not in name]
        chosen = re.compile(rf"{re.escape(group)}\s*:\s*{re.escape(option)}\b")
        choosing = [f"{path}, " for path in files.values() if chosen.search(path.read_text(encoding="utf-8"))]
        where = given.place(group) or (choosing[0] if choosing else f"conf/{base}.yaml, ")
        key = "" if where.startswith("override") else f"key {group.replace('/', '.')}: "
        if option.endswith((".yaml", ".yml")):
            return UserError(f"{where}{key}{option} is a file, and a file may not choose another one.")
        return UserError(f"{where}{key}{group or 'conf'} has no option {option}.{name_hint(option, known)}")
    if unmatched := re.search(r"Could not (?:override|delete) '([^']*)'\. No match in the defaults list", text):
        name = unmatched[1]
        elsewhere = _of_other_recipe(name, given.name, [])
        return UserError(f"{place(name)}{elsewhere or f'there is no group {name}. See: plmtune ls'}")
    if re.search(r"Key '([^']*)' (is )?not in", text) and full_key:
        owner = _search(r"object_type=(\w+)", text) or ""
        siblings = FIELDS.get(owner, [])
        group, _, name = owner.partition("__")
        of_recipe = any(schema.__name__ == owner for schema in SCHEMAS.values())
        if said := of_other_component(full_key, group, name):
            return UserError(f"{place(full_key)}{said}")

        def everywhere() -> list[str]:
            return [*_chosen_keys(given.overrides), *_all_keys(base, frozenset(SCHEMAS.values()))]

        if of_recipe and (said := _of_other_recipe(full_key, given.name, siblings, everywhere)):
            return UserError(f"{place(full_key)}{said}")
        if name and not siblings:
            parent = full_key.rpartition(".")[0]
            return UserError(f"{place(full_key)}key {full_key}: unknown. {parent} is {name}, which has no settings.")
        return unknown_key(place(full_key), full_key, siblings, everywhere)
    if "Ambiguous value" in text:
        key, _, value = str(_search(r"argument '([^']+)'", text)).partition("=")
        listed = shlex.quote(f"{key}=[{value}]")
        thousands = value.replace(",", "") if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", value) else None
        numbers = [f"{key}={number}" for number in (with_point(value), thousands) if number]
        number = f" As one number: {either(numbers)}." if numbers else ""
        return UserError(
            f"override {key}={value}: several values.{number} To run them all: plmtune run -m ...; as a list: "
            f"{listed}; as one text: {quote_override(key, value)}"
        )
    merged = _search(r"Error merging override [+~]*([\w./-]+)=", text) or ""
    key = full_key or merged
    if merged and not key.startswith(merged):  # OmegaConf gives keys in lists from their table on
        key = f"{merged}[].{key}"
    said = in_words(text)
    if said is None and "ListConfig" in text:
        said = "needs a list"
    if said == "needs a list" and (override := given.override(key)):
        value = override.partition("=")[2]
        if value.startswith("["):  # OmegaConf says the same of a list where a table belongs
            said = "needs a table of its keys"
        elif not value.startswith("{"):
            said += f". Write {shlex.quote(f'{key}=[{value}]')}"
    if said == "needs a table of its keys":
        inner = [name for name in _all_keys(base, frozenset(SCHEMAS.values())) if name.startswith(f"{key}.")]
        said += f": {', '.join(inner[:8])}" if inner else ""
    where = place(key)
    return UserError(f"{where}key {key}: {said}." if key and said else f"{where}{chain[-1].splitlines()[0]:.300}")


# Names of types in errors and annotations, in words.
TYPES = {"Integer": "a whole number", "int": "a whole number", "Float": "a number", "float": "a number",
         "Boolean": "true or false", "bool": "true or false", "string": "a text", "str": "a text",
         "list": "a list", "dict": "a table", "tuple": "a list", "ListConfig": "a list", "DictConfig": "a table",
         "Dict": "a table", "List": "a list", "Tuple": "a list", "NoneType": "null"}  # fmt: skip


def in_words(text: str) -> str | None:
    """Translate OmegaConf's error about a value of the wrong type; None for other errors."""
    wrong = r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)"
    if found := re.search(wrong, text, re.DOTALL):
        point = with_point(found[1]) if found[2] in ("Float", "float") else None
        return f"{found[1]:.80} is not {TYPES.get(found[2], found[2])}" + (f": write {point}" if point else "")
    if found := re.search(r"Cannot convert '(\w+)' to string: '(.*)'", text):
        return f"needs a text, not {TYPES.get(found[1], found[1])}"
    found = re.search(r"Value '(.*)' of type '\w+' is incompatible with type hint '(.*)'", text)
    if found := found or re.search(r"Cannot assign (?:container '(.*)' of type '\w+'|\w+) to (.*)", text):
        outer = re.sub(r"(Dict|List|Tuple)\[.*\]", r"\1", found[2])
        kinds = sorted({TYPES[name] for name in re.findall(r"\w+", outer) if name in TYPES}, key=len)
        if found[1] is None and kinds == ["a table"]:
            return "needs a table of its keys"
        return f"{found[1] or 'its value':.80} is not {either(kinds or [outer])}"
    if found := re.search(r"(?:Invalid type assigned|Invalid value assigned): .* is not a (\w+)", text):
        return "needs a list" if found[1] == "ListConfig" else "needs a table of its keys"
    if found := re.search(r"(?:Invalid type assigned): .* is not a subclass of \w+\. value: (.*)", text):
        return f"needs its keys, as {{KEY: VALUE}}, not {found[1]:.80}"
    if re.search(r"Merge error: \w+ is not a subclass of", text):
        return "needs a table of its keys"
    if "Cannot merge" in text or "cannot be merged" in text:
        return "needs a list" if "with ListConfig" in text else "needs a table of its keys"
    if "is not Optional" in text or "Incompatible value 'None'" in text:
        return "needs a value, not null"
    return None


def _search(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None
