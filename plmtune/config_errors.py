"""What Hydra and OmegaConf say, in sentences a person can act on: which file or override, which key, what instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from plmtune.errors import UserError, did_you_mean
from plmtune.registry import describe
from plmtune.schema import SCHEMAS


def _of_other_component(full_key: str, group: str, name: str) -> str | None:
    """What to say of a key that its component does not have, but others of the same group do."""
    parent, _, leaf = full_key.rpartition(".")
    table = describe().get(group, {})
    having = [other for other, held in table.items() if any(p.name == leaf and p.default for p in held.parameters)]
    if name not in table or not having:
        return None
    # A loss of pairs is replaced by another loss of pairs first.
    having.sort(key=lambda other: table[other].returns != table[name].returns)
    choice = f"{parent.replace('.', '/')}={having[0]} {full_key}=..."
    return (
        f"{parent} is {name}, which has no key {leaf}; components of {group} that have it: "
        f"{', '.join(having)} ({choice})"
    )


def _of_other_recipe(key: str, recipe: str, keys: Sequence[str]) -> str | None:
    """What to say of a key that its recipe does not have, but others do."""
    having = [name for name, schema in SCHEMAS.items() if any(item.name == key for item in fields(schema))]
    if not having:
        return None
    near = did_you_mean(key, keys)
    return f"{recipe} has no key {key} (it belongs to {', '.join(having)}).{near if near.endswith('?') else ''}"


def unknown_key(
    place: str, full_key: str, siblings: Iterable[str], everywhere: Callable[[], Iterable[str]] = list
) -> UserError:
    """An unknown key, with the nearest one beside it, or the same name elsewhere in the config."""
    parent, _, leaf = full_key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    beside = [prefix + name for name in siblings]
    hint = did_you_mean(full_key, beside)
    if "Did you mean" not in hint:
        elsewhere = (key for key in everywhere() if key.rpartition(".")[2] == leaf and key != full_key)
        hint = next((f" Did you mean {key}?" for key in elsewhere), hint)
    return UserError(f"{place}key {full_key}: unknown.{hint}")


def explain(
    error: Exception,
    overrides: Sequence[str],
    files: dict[str, Path],
    base: str,
    all_keys: Callable[[str], list[str]],
    keys_of: dict[str, list[str]],
) -> UserError:
    """Translate an error of Hydra's composition.

    Args:
        overrides: what was typed on the command line.
        files: name in Hydra's store -> the file it came from.
        base: the shipped config that everything builds on.
        all_keys: gives every full key of a shipped config.
        keys_of: type name -> its keys.
    """
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(chain)
    full_key = _search(r"full_key: (\S+)", text)

    def typed_by_hand(key: str) -> str | None:
        return next((o for o in overrides if o.lstrip("+~").split("=")[0].split("@")[0] == key), None)

    def place(key: str) -> str:
        override = typed_by_hand(key)
        if override:
            return f"override {override}, "
        stored = _search(r"In '([^']+)'", text)
        if stored in files:
            return f"{files[stored]}, "
        return f"conf/{stored or base}.yaml, "

    if missing := re.search(r"Could not find '([^']+)'", text):
        group, _, option = missing[1].rpartition("/")
        known = re.findall(r"^\t(\S+)$", text.split("Config search path")[0], re.MULTILINE)
        override = typed_by_hand(group)
        where = f"override {override}" if override else _place_of_choice(files, group, option) or f"conf/{base}.yaml"
        return UserError(f"{where}: {group or 'conf'} has no option {option}.{did_you_mean(option, known)}")
    if unmatched := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        return UserError(f"{place(unmatched[1])}there is no group {unmatched[1]}. See: plmtune ls")
    if re.search(r"Key '([^']*)' (is )?not in", text) and full_key:
        owner = _search(r"object_type=(\w+)", text) or ""
        siblings = keys_of.get(owner, [])
        group, _, name = owner.partition("__")
        recipe = next((recipe for recipe, schema in SCHEMAS.items() if schema.__name__ == owner), None)
        if said := _of_other_component(full_key, group, name):
            return UserError(f"{place(full_key)}{said}")
        if recipe and (said := _of_other_recipe(full_key, recipe, siblings)):
            return UserError(f"{place(full_key)}{said}")
        return unknown_key(place(full_key), full_key, siblings, lambda: all_keys(base))
    if "Ambiguous value" in text:
        key, _, value = str(_search(r"argument '([^']+)'", text)).partition("=")
        return UserError(f"override {key}={value}: several values. To run them all: plmtune run -m ...; "
                         f"as a list: {key}=[{value}]")  # fmt: skip
    if parse := re.search(r"Error parsing override '([^']*)'\n(.*)", text):
        return UserError(f"override {parse[1]}: cannot be understood ({parse[2]}). Quote special characters.")
    if "is not a ListConfig" in text:
        key, _, value = next(
            (o for o in overrides if "=" in o and _search(r"override (\S+)", text) == o), "="
        ).partition("=")
        return UserError(f"{place(key)}key {key}: needs a list. Write {key}=[{value}].")
    if wrong := re.search(r"(Value .*|.*could not be converted.*|Cannot (?:convert|assign).*|Unsupported .*)", text):
        key = full_key or ""
        return UserError(f"{place(key)}key {key}: {wrong[1].strip():.300}.")
    return UserError(f"{place(full_key or '')}{(chain[-1] or type(error).__name__).splitlines()[0]}")


def _search(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _place_of_choice(files: dict[str, Path], group: str, option: str) -> str | None:
    """The overlay whose text chooses this option."""
    for path in files.values():
        if re.search(rf"{re.escape(group)}\s*:\s*{re.escape(option)}\b", path.read_text(encoding="utf-8")):
            return f"{path}, key {group}"
    return None
