"""Overrides as they are typed: parsed, checked, and rewritten to Hydra's form."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from plmtune.config.choices import FILE_PRESET, SEVERAL, group_at, read_preset, take_choices
from plmtune.config.overrides import hydra_literal, quote_override
from plmtune.config.rules import check_override, is_option
from plmtune.config.signatures import dict_keys
from plmtune.errors import UserError

_TABLES = "plmtune_tables_"  # what the groups of tables of a multirun begin with in Hydra's store
_typed: dict[str, str] = {}  # a choice of such a table -> the override that stands for it


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError):
        return None


def parse(text: str, following: Sequence[str] = ()) -> Override:
    """Parse an override; `following` words may be its rest, split off at spaces by the shell."""
    if parsed := _parsed(text):
        return parsed
    way = _quoted([text, *following])
    hint = f" Quote it for the shell and for Hydra: {way}" if way else " Write key=value, with the value in quotes."
    raise UserError(f"override {text:.200}: cannot be understood.{hint}")


def _quoted(words: Sequence[str]) -> str | None:
    """The quoted form of the override that `words` begin with; None if it is not clear."""
    key, equals, value = words[0].partition("=")
    close = {"[": "]", "{": "}"}.get(value[:1])
    if close and not value.endswith(close):
        ends = [end for end, word in enumerate(words, 1) if word.endswith(close)]
        for end in ends:
            whole = " ".join(words[:end])
            if _parsed(whole):
                return shlex.quote(whole)
        if (ends and "{" in value) or (not ends and (close == "]" or ":" in value)):
            return None
        if ends:
            value = " ".join(words[: ends[0]]).partition("=")[2]
    plain: Any = value
    if value.startswith("[") and value.endswith("]"):
        plain = [part.strip().strip("'\"") for part in value[1:-1].split(",")]
    typed = quote_override(key, plain)
    parsed = _parsed(shlex.split(typed)[0])
    return typed if parsed and equals and len(typed) < 500 and parsed.value() == plain else None


def plain_value(value: Any) -> Any:
    """A parsed override's value without Hydra's own types: what is swept over becomes a list."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, ChoiceSweep | list):
        return [plain_value(child) for child in (value.list if isinstance(value, ChoiceSweep) else value)]
    if isinstance(value, dict):
        return {plain_value(key): plain_value(child) for key, child in value.items()}
    return value if isinstance(value, str | int | float | None) else None  # ranges, intervals, globs hold no text


def check_overrides(overrides: Sequence[str], *, multirun: bool = False) -> list[str]:
    """Refuse what is no override, and write choices in Hydra's form.

    Keys may be added to dictionaries, as ``data.sources={mine: ...}`` does. In a multirun several tables of a component
    (``model={num_layers: 2, embed_dim: 64},{num_layers: 4, embed_dim: 48}``) are its values, one for each job, and each
    key keeps the last override that gives it: Hydra's sweepers keep the order of the first.
    """
    return [text for part in _check(overrides, multirun=multirun)[0] for text in part]


def _check(overrides: Sequence[str], *, multirun: bool) -> tuple[list[list[str]], list[list[str]]]:
    """`check_overrides` for each override: what is left of it beside later ones, and what it stands for alone."""
    checked: list[list[str]] = []
    alone: list[list[str]] = []
    tied: dict[str, str] = {}  # full key that such tables give -> their override
    for index, text in enumerate(overrides):
        # Hydra's multirun reads its own options, one of which unpickles a file, among the overrides.
        if ("=" not in text and not text.startswith("~")) or text.startswith("-"):
            before, equals, value = overrides[index - 1].partition("=") if index else ("", "", "")
            way = f" As a part of {before}: {quote_override(before, f'{value} {text}')}" if equals else ""
            if Path(text).is_dir():
                way = f" A model is the value of a key: init_from={text}, of quantize and prune checkpoint={text}."
            raise UserError(f"{text!r:.200} is neither a YAML file nor an override of the form key=value.{way}")
        if text.startswith("="):
            raise UserError(f"override {text:.200}: has no key. Write key=value.")
        if re.match(r"[+~]*recipe\b", text):
            raise UserError(f"override {text:.200}: a config has its recipe. Run another one: plmtune run NAME")
        part: list[str] = []
        alone.append([])
        typed = parse(text, overrides[index + 1 :])
        if multirun and _holds_tables(typed):
            choice, keys, places = _store_tables(text, typed, f"{_TABLES}{index}")
            if (twice := next((key for key in keys if key in tied), None)) is not None:
                raise UserError(f"override {text:.200}: gives {twice}, as override {tied[twice]:.200} does. Keep one.")
            for place in places:
                checked = [_without(place, SEVERAL, earlier) for earlier in checked]
            checked = [_left(earlier, keys) for earlier in checked]
            tied |= dict.fromkeys(keys, text)
            checked.append([choice])
            alone[-1].append(choice)
            continue
        for normal in _normalize(text, typed, multirun=multirun):
            parsed = parse(normal)
            value = plain_value(parsed._value)
            check_override(text, parsed.key_or_group, parsed.package, value, multirun=multirun)
            key, _, chosen = normal.lstrip("+").partition("=")
            in_dict = any(key == name or key.startswith(f"{name}.") for name in dict_keys())
            if key.endswith(".component") and not in_dict:
                place = key.removesuffix(".component").replace(".", "/")
                raise UserError(f"override {text}: choose it as {place}={chosen}.")
            keys = {_full_key(normal)}
            if isinstance(value, dict):
                keys = {*_leaves(value, _full_key(normal))}
            if (twice := next((name for name in sorted(keys) if name in tied), None)) is not None:
                which = "this key" if twice == _full_key(text) else twice
                raise UserError(
                    f"override {text:.200}: the tables of override {tied[twice]:.200} give {which}, too. Keep one of "
                    "them."
                )
            part.append(f"++{normal.lstrip('+')}" if in_dict else normal)
            alone[-1].append(part[-1])
            if multirun and not parsed.is_delete() and not chosen_components([normal]):
                checked = [_left(earlier, keys) for earlier in checked]
                if isinstance(value, dict):
                    checked, part[-1] = _merged(checked, part[-1], value)
        for place, name in chosen_components(part).items():
            checked = [_without(place, name, earlier) for earlier in checked]
        checked.append(part)
    return checked, alone


def _full_key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~").replace("/", ".")


def _holds_tables(parsed: Override) -> bool:
    """Whether an override gives a component several values, one of them a table of its keys."""
    if not isinstance(parsed._value, ChoiceSweep) or parsed.package is not None:
        return False
    return group_at(parsed.key_or_group) is not None and any(isinstance(one, dict) for one in parsed._value.list)


def _store_tables(text: str, parsed: Override, name: str) -> tuple[str, set[str], list[str]]:
    """Store the tables of a component as options of a group of their own, which Hydra's sweepers choose from.

    Hydra takes only names for a component, and a product of keys for others; an option can give several keys at once.

    Args:
        name: of the group.

    Returns:
        The choice in Hydra's form; the full keys that each table gives; the places at which they choose components.
    """
    key, sweep = parsed.key_or_group, parsed._value
    assert isinstance(sweep, ChoiceSweep)
    values, place = plain_value(sweep), key.replace(".", "/")
    check_override(text, key, None, values, multirun=True)
    if parsed.is_add() or parsed.is_delete():
        raise UserError(f"override {text:.200}: write it without {text[:1]}.")
    options: list[str] = []
    first: tuple[set[str], list[str]] = set(), []
    for number, value in enumerate(values):
        choices: dict[str, str | None] = {}
        settings = take_choices(value, place, str(group_at(key)), choices, f"override {text:.200}, ")
        keys = {*_leaves(settings, place.replace("/", ".")), *(at.replace("/", ".") for at in choices)}
        if not keys or any(part == "defaults" for one in keys for part in one.split(".")):
            what = "has a key defaults, which tables cannot have" if keys else "has a table without keys"
            raise UserError(f"override {text:.200}: {what}. Write {key}={{KEY: VALUE}},{{KEY: OTHER}}.")
        if number and (odd := sorted(keys ^ first[0])):
            raise UserError(
                f"override {text:.200}: its tables must give the same keys, and not all of them give {odd[0]}."
            )
        first = keys, list(choices)
        node: dict[str, Any] = settings
        for part in reversed(place.split("/")):
            node = {part: node}
        node["defaults"] = [*({f"override /{at}": chosen} for at, chosen in choices.items()), "_self_"]
        literal = hydra_literal(value)
        options.append(f"{number}_" + re.sub(r"\W+", "-", literal).strip("-"))
        ConfigStore.instance().store(group=name, name=options[-1], node=OmegaConf.create(node), package="_global_")
        _typed[f"+{name}={options[-1]}"] = f"{key}={literal}"
    chosen = ",".join(options)
    if not sweep.simple_form or len(options) == 1:
        chosen = f"choice({chosen})"
    if sweep.shuffle:
        chosen = f"shuffle({chosen})"
    if sweep.tags:
        chosen = f"tag({','.join(sorted(sweep.tags))},{chosen})"
    return f"+{name}={chosen}", *first


def _leaves(value: Any, key: str) -> list[str]:
    if isinstance(value, dict):
        return [leaf for name, child in value.items() for leaf in _leaves(child, f"{key}.{name}")]
    return [key]


def _left(part: list[str], keys: Collection[str]) -> list[str]:
    return [left for text in part for left in without_keys(text, keys)]


def without_keys(text: str, keys: Collection[str]) -> list[str]:
    """An override without these full keys, which its table may give; nothing where it gives no other key."""
    head, _, literal = text.partition("=")
    key = _full_key(text)
    if key in keys:
        return []
    if not literal.lstrip().startswith("{") or not any(name.startswith(f"{key}.") for name in keys):
        return [text]
    value = plain_value(parse(text)._value)
    if not isinstance(value, dict) or (kept := _pruned(value, key, keys)) == value:
        return [text]
    return [f"{head}={hydra_literal(kept)}"] if kept else []


def _pruned(value: dict[str, Any], key: str, keys: Collection[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, child in value.items():
        full = f"{key}.{name}"
        if isinstance(child, dict) and child:
            if inner := _pruned(child, full, keys):
                kept[name] = inner
        elif full not in keys:
            kept[name] = child
    return kept


def _merged(checked: list[list[str]], text: str, value: dict[str, Any]) -> tuple[list[list[str]], str]:
    """A table with what earlier tables of its key give beside it: a sweeper keeps the last override of a key."""
    head = text.partition("=")[0]
    for number, part in enumerate(checked):
        for one in part:
            if one.partition("=")[0] != head or not isinstance(earlier := plain_value(parse(one)._value), dict):
                continue
            both = OmegaConf.to_container(OmegaConf.merge(earlier, value))
            checked[number] = [other for other in part if other is not one]
            text = f"{head}={hydra_literal(both)}"
    return checked, text


def as_typed(text: str) -> str:
    """The override that a choice of a table stands for; any other as it is."""
    return _typed.get(text, text)


def _without(place: str, name: str | None, part: list[str]) -> list[str]:
    """What one override stands for, without the component at a place, which gives way to a later choice of `name`.

    Of the same component the settings stay, as they do between files; several loggers are replaced as a whole.
    """
    if place not in (chosen := chosen_components(part)):
        return part
    if chosen[place] == name != SEVERAL:
        return [t for t in part if t.partition("=")[0].lstrip("+~") != place]
    return [t for t in part if not f"{t.partition('=')[0].lstrip('+~').replace('.', '/')}/".startswith(f"{place}/")]


def _normalize(text: str, parsed: Override, *, multirun: bool) -> list[str]:
    """The overrides in Hydra's form that a choice of a component stands for; any other override stays as it is.

    In a multirun a table of settings becomes one override for each: a sweeper would keep it instead of a choice.
    """
    key = parsed.key_or_group
    group = group_at(key) if parsed.package is None and key else None
    if group is None or parsed.is_sweep_override() or parsed.is_delete() or parsed.is_add():
        return [text]
    place, value = key.replace(".", "/"), plain_value(parsed._value)
    if value in (None, []):
        if "/" in place:
            raise UserError(f"override {text}: takes the name of a component. See: plmtune ls {group}")
        return [f"~{place}"]
    if isinstance(value, str):
        if value.endswith((".yaml", ".yml")):
            preset = read_preset(Path(value), place, group)
            value = FILE_PRESET + re.sub(r"\W", "_", value)
            ConfigStore.instance().store(group=place, name=value, node=OmegaConf.create(preset))
        elif key == place:
            return [text]
        if is_option(value):  # else check_override says what it is
            return [f"{place}={value}"]
    choices: dict[str, str | None] = {}
    settings = take_choices(value, place, group, choices, f"override {text:.200}, ")
    if not choices and not (multirun and isinstance(value, dict) and "/" not in place):
        return [text]
    return [
        *(f"{at}={name}" for at, name in choices.items()),
        *(f"{key}.{name}={hydra_literal(child)}" for name, child in settings.items()),
    ]


def chosen_components(overrides: Sequence[str]) -> dict[str, str | None]:
    """What overrides in Hydra's form choose, by place."""
    pairs = [text.partition("=") for text in overrides]
    return {
        place.lstrip("+~"): None if place.startswith("~") else name.strip("'\"")
        for place, _, name in pairs
        if "." not in place and name[:1] != "{" and group_at(place.lstrip("+~"))
    }


def split_sweeps(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Divide overrides into those of one value and those of several (a=1,2 and range()), by key as "key=value" each.

    As in a multirun each key keeps the last override that gives it; the others stay as they are typed.
    """
    plain: list[str] = []
    swept: dict[str, list[str]] = {}
    checked, alone = _check(overrides, multirun=True)
    for typed, left, whole in zip(overrides, checked, alone, strict=True):
        for text in [typed] if left == whole else left:
            parsed = parse(text)
            if not parsed.is_sweep_override():
                plain.append(text)
            elif parsed.is_discrete_sweep():
                key = parsed.get_key_element()
                swept[key] = [f"{key}={value}" for value in parsed.sweep_string_iterator()]
            else:
                raise UserError(f"override {text}: names no single values. Write key=1,2,3 or key=range(1,10,3).")
    return plain, swept
