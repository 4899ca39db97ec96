"""Hints for names in the wrong place: a config, a preset, a component, a group, a device, a cluster or a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from plmtune.config.builtin import builtin_folder
from plmtune.config.choices import place_of_group, preset_groups, presets
from plmtune.config.overrides import quote_override
from plmtune.config.schema import SCHEMAS
from plmtune.errors import UserError, did_you_mean, either, near_names
from plmtune.io import hub
from plmtune.io.run_summary import explain_missing
from plmtune.registry import describe_components

DEVICES = Path(__file__).parents[1] / "devices"
CLUSTERS = Path(__file__).parents[1] / "clusters"
_EXAMPLES = {"preference": "aries"}  # a config of the recipe, where none has its name


def name_hint(name: str, known: Iterable[str] = ()) -> str:
    """`` Did you mean X?`` with near ones of the known names, else what `name` is and which command takes it.

    Else the known names.
    """
    near = did_you_mean(name, known)
    return near if near.endswith("?") else _what_is(name) or near


def _what_is(name: str) -> str:
    if (builtin_folder("conf") / f"{name}.yaml").is_file():
        return f" {name} is a config: plmtune run {name}"
    table = describe_components()
    for kind, names_of in (("preset", presets), ("component", lambda group: table[group])):
        if group := next((group for group in table if name in names_of(group)), None):
            place = "selection.rules" if group == "rule" else place_of_group(group)
            return f" {name} is a {kind} of the group {group}: plmtune run {usage_of(place, name)}"
    if name in table:
        return f" {name} is a group: plmtune ls {name}"
    if (DEVICES / f"{name}.yaml").is_file():
        return f" {name} is a device: plmtune plan CONFIG --device {name}"
    if (CLUSTERS / f"{name}.yaml").is_file():
        return f" {name} is a cluster: plmtune plan CONFIG --cluster {name}"
    if (builtin_folder("recipes") / f"{name}.py").is_file():
        texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(builtin_folder("conf").glob("*.yaml"))}
        configs = [config for config, text in texts.items() if f"\nrecipe: {name}\n" in text]
        return f" {name} is a recipe, which the configs {', '.join(configs)} run: plmtune run {configs[0]}"
    if name and Path(name).is_dir():
        return f" {name} is a directory: plmtune generate {name} writes with a checkpoint"
    return ""


def refuse_preset(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a preset where a config is expected."""
    if found := preset_groups(content):
        use = " or ".join(f"plmtune run {usage_of(place_of_group(group), str(path))}" for group in found)
        raise UserError(f"{path}: is a preset of the group {either(found)}, not a config. Use it with: {use}")


def usage_of(place: str, name: str) -> str:
    """A config that has a component at a place, and the override that chooses `name` there."""
    top = place.partition("/")[0].partition(".")[0]
    having = [recipe for recipe, schema in SCHEMAS.items() if any(item.name == top for item in fields(schema))]
    recipe = having[0] if having else "pretrain"
    return f"{_EXAMPLES.get(recipe, recipe)} {quote_override(place, name)}"


def _near_path(path: Path) -> str:
    """`` Did you mean X?`` with directories that have nearly this path: one of its names is wrong."""
    missing = next(one for one in [*reversed(path.parents), path] if not one.exists())
    with contextlib.suppress(OSError):
        beside = {one.name: one for one in missing.parent.iterdir() if one.is_dir()}
        found = [beside[name] / path.relative_to(missing) for name in near_names(missing.name, beside)]
        if near := [str(one) for one in found if one.exists()]:
            return f" Did you mean {either(near)}?"
    return ""


def check_model_path(path: str | Path) -> None:
    """Refuse what cannot be a model: a path that does not exist, or a file. Asks no hub and imports no torch."""
    if hub.parse(path):
        return
    path = Path(path)
    if not path.exists():
        raise UserError(
            explain_missing(path)
            or f"There is no {path} (seen from {Path.cwd()}). Give a checkpoint, a model directory, a run directory or "
            f"a model of the Hugging Face hub (OWNER/NAME).{_near_path(path) or name_hint(str(path))}"
        )
    if hub.is_gguf(path):
        raise UserError(f"{path} is a GGUF file. Convert it to a model directory: plmtune convert {path} OUT")
    if not path.is_dir() and path.name not in ("latest", "best"):  # which name a checkpoint of their folder
        raise UserError(f"{path} is not a directory. Give a checkpoint, a model directory or a run directory.")
