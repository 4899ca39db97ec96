"""``plmtune ls``: what can be run, and what a config can name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from plmtune.cli import COMMANDS
from plmtune.cli.options import import_option
from plmtune.config.builtin import builtin_folder
from plmtune.config.names import CLUSTERS, DEVICES, name_hint
from plmtune.config.rules import read_yaml
from plmtune.errors import UserError, did_you_mean
from plmtune.io.tables import Column, Table, show
from plmtune.models.families import model_types
from plmtune.registry import Component, Description, describe_components, keys_of
from plmtune.units import show_count


@click.command()
@click.argument("group", required=False)
@click.argument("name", required=False)
@import_option
def ls(group: str | None, name: str | None) -> None:
    """List recipes, configs, groups, devices and clusters; or the components and presets of GROUP with their settings.

    NAME is a component or a preset of the group, and all that is known of it is shown.

    \b
    plmtune ls
    plmtune ls model
    plmtune ls model qwen3
    plmtune ls attention
    plmtune ls devices
    plmtune ls clusters
    """
    if group is None:
        _overview(describe_components())
    elif group == "devices":
        if name is not None:
            raise UserError(f"plmtune ls devices takes no name. See: plmtune plan CONFIG --device {name}")
        _devices()
    elif group == "clusters":
        if name is not None:
            raise UserError(f"plmtune ls clusters takes no name. See: plmtune plan CONFIG --cluster {name}")
        _clusters()
    else:
        group = group.rpartition("/")[2]
        _check_group(group)
        if name is not None:
            _one(group, name, describe_components()[group])
        elif group == "model":
            _models(describe_components()[group])
        else:
            _group(group, describe_components()[group])


def _first_comment(path: Path) -> str:
    line = next(iter(path.read_text(encoding="utf-8").splitlines()), "")
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def _overview(table: Any) -> None:
    conf = builtin_folder("conf")
    show("recipes (single files; plmtune cp recipes/NAME my.py)")
    _list((path.stem, "") for path in sorted(builtin_folder("recipes").glob("[a-z]*.py")))
    show("configs (plmtune run NAME)")
    _list((path.stem, _first_comment(path)) for path in sorted(conf.glob("*.yaml")))
    show("groups (plmtune ls GROUP; choose with GROUP=NAME)")
    _list(
        (group, ", ".join([*sorted(table[group]), *sorted(path.stem for path in (conf / group).glob("*.yaml"))]))
        for group in sorted(table)
    )
    show("devices (plmtune ls devices; predict for one with plmtune plan CONFIG --device NAME)")
    _list([("", ", ".join(sorted(path.stem for path in DEVICES.glob("*.yaml"))))])
    show("clusters (plmtune ls clusters; rank layouts of one with plmtune plan CONFIG --cluster NAME)")
    _list([("", ", ".join(sorted(path.stem for path in CLUSTERS.glob("*.yaml"))))])


def _devices() -> None:
    """The devices that plan knows, with the figures that decide."""
    from plmtune.devices.device import builtin_devices, load_device
    from plmtune.units import show_bytes, show_number

    table = Table([Column("device", key=True), "for a model", "reads at", "calibrated", Column("", folds=True)])
    for name in builtin_devices():
        device = load_device(name)
        speed = f"{show_number(device.bandwidth.value / 1e9)} GB/s"
        table.add(name, show_bytes(device.available), speed, "yes" if device.rates else "no", device.name)
    show(table)
    show("plmtune bench --calibrate FILE.yaml writes one for this machine")


def _clusters() -> None:
    """The clusters that plan knows, with the figures that decide."""
    from plmtune.clusters.cluster import builtin_clusters, load_cluster
    from plmtune.units import show_bytes, show_number

    names = ("devices", "for a model", "FLOP/s", "in a node", "between nodes")
    table = Table([Column("cluster", key=True), *map(Column, names), Column("", folds=True)])
    for name in builtin_clusters():
        cluster = load_cluster(name)
        speeds = [
            "" if link is None else f"{show_number(link.bandwidth.value / 1e9)} GB/s"
            for link in (cluster.node, cluster.network)
        ]
        devices = f"{cluster.nodes} x {cluster.devices_per_node}"
        table.add(name, devices, show_bytes(cluster.available), show_count(cluster.peak), *speeds, cluster.name)
    show(table)
    show("plmtune plan CONFIG --cluster FILE.yaml takes one of your own, with the same keys")
    show(f"Those of h100, with their sources: {CLUSTERS / 'h100.yaml'}")


def _list(entries: Iterable[tuple[str, str]]) -> None:
    """Names and what they are, indented."""
    table = Table([Column("", key=True), Column("", folds=True)], headings=False)
    for name, text in entries:
        table.add(f"  {name}", text)
    if table.rows:
        show(table)


def _check_group(group: str) -> None:
    table = describe_components()
    if group not in table:
        known = name_hint(group, [*table, "devices", "clusters"])
        near = f" {group} is a command: plmtune {group}" if group in COMMANDS else known
        raise UserError(f"There is no group {group}.{near}")


def _presets(group: str) -> dict[str, Path]:
    """The presets of a group by name, those of groups inside others, too."""
    conf = builtin_folder("conf")
    return {path.stem: path for path in sorted({*conf.glob(f"{group}/*.yaml"), *conf.glob(f"*/{group}/*.yaml")})}


def _group(group: str, components: Mapping[str, Description]) -> None:
    for name, entry in sorted(components.items()):
        summary = entry.doc.strip().split("\n\n")[0].replace("\n", " ")
        show(f"{name}  {summary}")
        _settings(group, name, entry)
    if places := _presets(group):
        show("presets")
        _list((name, _first_comment(path)) for name, path in places.items())


def _settings(group: str, name: str, entry: Description) -> None:
    settings, keys = [], keys_of(group, name)
    for parameter in entry.parameters:
        if parameter.default is not None:
            kind, default = parameter.type, keys[parameter.name].default
            if kind.startswith("Annotated["):
                kind = kind.removeprefix("Annotated[").rpartition(",")[0]
            nested = isinstance(default, Component)
            said = f"{default.name} (group {default.group})" if nested else parameter.default
            settings.append((f"  {parameter.name}", f"{kind} = {said}"))
    _list(settings)


def _component_of(path: Path) -> str:
    """The component that a preset is of: the first of its defaults."""
    return str(read_yaml(path).get("defaults", [""])[0])


def _parameters(comment: str) -> str:
    """The count that the first line of a model's preset begins with, in three digits."""
    found = re.search(r"(?:^|exact: )([\d.,]+)(M?)", comment)
    return "" if found is None else show_count(float(found[1].replace(",", "")) * (1e6 if found[2] else 1))


def _models(components: Mapping[str, Description]) -> None:
    """Which checkpoints load, and the presets of each model."""
    presets: dict[str, list[str]] = {}
    for name, path in _presets("model").items():
        count = _parameters(_first_comment(path))
        presets.setdefault(_component_of(path), []).append(f"{name} ({count})" if count else name)
    types = model_types()
    rows = [*types.items(), *(("", name) for name in sorted(components.keys() - types.values()))]
    table = Table([Column("model_type", key=True), "model", Column("presets (parameters), or the default", folds=True)])
    shown: set[str] = set()
    for model_type, name in rows:
        default = components[name].doc.partition(" by default")[0] if " by default" in components[name].doc else ""
        found = presets.get(name, [default])
        table.add(model_type, name, "" if name in shown else ", ".join(found))
        shown.add(name)
    show(
        "Checkpoints load by the model_type in their config.json:",
        table,
        "A GGUF file becomes a checkpoint with plmtune convert FILE.gguf DIR",
        "model=NAME takes a model or a preset; plmtune ls model NAME shows its settings",
    )


def _one(group: str, name: str, components: Mapping[str, Description]) -> None:
    """A component, also by a model_type that it loads, or a preset."""
    presets, types = _presets(group), model_types() if group == "model" else {}
    if name in presets:
        show(presets[name].read_text(encoding="utf-8").rstrip())
        return
    if name not in components and name not in types:
        raise UserError(f"Group {group} has no {name}.{did_you_mean(name, {*components, *presets, *types})}")
    name = name if name in components else types[name]
    entry = components[name]
    show(f"{name}  {entry.doc.strip()}", "settings")
    _settings(group, name, entry)
    if loads := [model_type for model_type, model in types.items() if model == name]:
        show("loads checkpoints whose model_type is")
        _list([("", ", ".join(loads))])
    if own := {preset: path for preset, path in presets.items() if _component_of(path) == name}:
        show("presets")
        _list((preset, _first_comment(path)) for preset, path in own.items())
