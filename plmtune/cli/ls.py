"""``plmtune ls``: what can be run, and what a config can name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from plmtune.cli import COMMANDS
from plmtune.cli.options import import_option
from plmtune.config.builtin import builtin_folder
from plmtune.config.names import DEVICES, name_hint
from plmtune.errors import UserError
from plmtune.io.tables import Column, Table, show
from plmtune.registry import Component, describe_components, keys_of


@click.command()
@click.argument("group", required=False)
@import_option
def ls(group: str | None) -> None:
    """List recipes, configs, groups and devices; or the components and presets of GROUP with their settings.

    \b
    plmtune ls
    plmtune ls attention
    plmtune ls devices
    """
    if group is None:
        _overview(describe_components())
    elif group == "devices":
        _devices()
    else:
        _group(group, describe_components())


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


def _list(entries: Iterable[tuple[str, str]]) -> None:
    """Names and what they are, indented."""
    table = Table([Column("", key=True), Column("", folds=True)], headings=False)
    for name, text in entries:
        table.add(f"  {name}", text)
    if table.rows:
        show(table)


def _group(group: str, table: Any) -> None:
    leaf = group.rpartition("/")[2]
    if leaf not in table:
        known = name_hint(leaf, [*table, "devices"])
        near = f" {leaf} is a command: plmtune {leaf}" if leaf in COMMANDS else known
        raise UserError(f"There is no group {group}.{near}")
    for name, entry in sorted(table[leaf].items()):
        summary = entry.doc.strip().split("\n\n")[0].replace("\n", " ")
        show(f"{name}  {summary}")
        settings, keys = [], keys_of(leaf, name)
        for parameter in entry.parameters:
            if parameter.default is not None:
                kind, default = parameter.type, keys[parameter.name].default
                if kind.startswith("Annotated["):
                    kind = kind.removeprefix("Annotated[").rpartition(",")[0]
                nested = isinstance(default, Component)
                said = f"{default.name} (group {default.group})" if nested else parameter.default
                settings.append((f"  {parameter.name}", f"{kind} = {said}"))
        _list(settings)
    conf = builtin_folder("conf")
    places = sorted({*conf.glob(f"{leaf}/*.yaml"), *conf.glob(f"*/{leaf}/*.yaml")})
    if places:
        show("presets")
        _list((path.stem, _first_comment(path)) for path in places)
