"""``plmtune ls``: what can be run, and what a config can name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from plmtune.cli import import_option
from plmtune.shipped import folder


@click.command()
@click.argument("group", required=False)
@import_option
def ls(group: str | None) -> None:
    """List recipes, configs and groups; or the components of GROUP with their settings.

    \b
    plmtune ls
    plmtune ls attention
    """
    from rich.console import Console

    from plmtune.registry import describe

    console = Console(highlight=False, soft_wrap=True)
    if group is None:
        _overview(console, describe())
    else:
        _group(console, group, describe())


def _first_comment(path: Path) -> str:
    line = next(iter(path.read_text(encoding="utf-8").splitlines()), "")
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def _overview(console: Any, table: Any) -> None:
    from rich.table import Table

    conf = folder("conf")
    console.print("[bold]recipes[/] (single files; plmtune cp recipes/NAME my.py)")
    for path in sorted(folder("recipes").glob("[a-z]*.py")):
        console.print(f"  {path.stem}")
    grid = Table(box=None, show_header=False, padding=(0, 2))
    console.print("[bold]configs[/] (plmtune run NAME)")
    for path in sorted(conf.glob("*.yaml")):
        grid.add_row(path.stem, _first_comment(path))
    console.print(grid)
    console.print("[bold]groups[/] (plmtune ls GROUP; choose with GROUP=NAME)")
    grid = Table(box=None, show_header=False, padding=(0, 2))
    for group in sorted(table):
        presets = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        grid.add_row(group, ", ".join([*sorted(table[group]), *presets]))
    console.print(grid)


def _group(console: Any, group: str, table: Any) -> None:
    from rich.markup import escape

    from plmtune.errors import UserError, did_you_mean

    leaf = group.rpartition("/")[2]
    if leaf not in table:
        raise UserError(f"There is no group {group}.{did_you_mean(leaf, table)}")
    for name, entry in sorted(table[leaf].items()):
        summary = entry.doc.strip().split("\n\n")[0].replace("\n", " ")
        console.print(f"[bold]{name}[/]  {escape(summary)}")
        width = max((len(p.name) for p in entry.parameters), default=0)
        for parameter in entry.parameters:
            if parameter.default is not None:
                kind = parameter.type
                if kind.startswith("Annotated["):
                    kind = kind.removeprefix("Annotated[").rpartition(",")[0]
                default = _nested_default(parameter.default)
                console.print(f"    {parameter.name:<{width}}  {kind} = {default}", markup=False)
    conf = folder("conf")
    places = sorted({*conf.glob(f"{leaf}/*.yaml"), *conf.glob(f"*/{leaf}/*.yaml")})
    if places:
        console.print("[bold]presets[/]")
        for path in places:
            console.print(f"    {path.stem:<16}{_first_comment(path)}", markup=False)


def _nested_default(text: str) -> str:
    """``component('attention', 'mla')`` reads as ``mla (group attention)``."""
    if not text.startswith("component("):
        return text
    group, name = (part.strip("'\" ") for part in text.removeprefix("component(").rstrip(")").split(",")[:2])
    return f"{name} (group {group})"
