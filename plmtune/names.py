"""What a name is: a config, a preset, a component, a group, a device, a recipe. For names in the wrong place."""

from __future__ import annotations

from pathlib import Path

from plmtune.config_choices import place_of_group, presets
from plmtune.registry import describe
from plmtune.schema import component_keys
from plmtune.shipped import folder

DEVICES = Path(__file__).parent / "devices"


def where_it_belongs(name: str) -> str:
    """A sentence that says what `name` is and which command takes it; empty if it is nothing that plmtune knows."""
    if (folder("conf") / f"{name}.yaml").is_file():
        return f" {name} is a config: plmtune run {name}"
    table, groups = describe(), component_keys()
    for kind, found in (
        ("preset", [group for group in table if name in presets(group)]),
        ("component", [group for group in table if name in table[group]]),
    ):
        if found:
            choice = _choice(found[0], name, groups)
            return f" {name} is a {kind} of the group {found[0]}: plmtune run pretrain {choice}"
    if name in table:
        return f" {name} is a group: plmtune ls {name}"
    if (DEVICES / f"{name}.yaml").is_file():
        return f" {name} is a device: plmtune plan CONFIG --device {name}"
    if (folder("recipes") / f"{name}.py").is_file():
        texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder("conf").glob("*.yaml"))}
        configs = [config for config, text in texts.items() if f"\nrecipe: {name}\n" in text]
        return f" {name} is a recipe, which the configs {', '.join(configs)} run: plmtune run {configs[0]}"
    if name and Path(name).is_dir():
        return f" {name} is a directory: plmtune generate {name} writes with a checkpoint"
    return ""


def _choice(group: str, name: str, groups: set[str]) -> str:
    return f"selection.rules=[{name}]" if group == "rule" else f"{place_of_group(group, groups)}={name}"
