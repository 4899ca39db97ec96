"""``plmtune runs``: which runs there are, and how it stands with each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from plmtune.cli.options import console
from plmtune.errors import UserError
from plmtune.training.run_summary import Summary, find_runs, summarize
from plmtune.units import show_count

if TYPE_CHECKING:
    from rich.console import Console

# Columns that narrower consoles go without. The path stays: other commands take it.
_LEAST_WIDTH = {"recipe": 100, "time": 90, "model": 76, "bits/byte": 76}


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"), metavar="[DIR]")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects instead of a table.")
def runs(directory: Path, as_json: bool) -> None:
    """List the runs in DIR (default: runs), the oldest first.

    A run that failed is listed with the reason. A run is killed where it did not say how it ended, and no process is
    in it any more.

    \b
    plmtune runs
    plmtune runs runs/pretrain --json
    """
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory}. Runs are in runs/, where plmtune run was called.")
    found = [summarize(path) for path in find_runs(directory)]
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
    elif found:
        show(console(), found)
    else:
        raise UserError(f"There are no runs in {directory}. Start one: plmtune run pretrain")


def show(console: Console, found: Sequence[Summary], settings: Sequence[str] = ()) -> None:
    """Print a table of runs, and below it why runs failed.

    Args:
        settings: of each run, those that are its own; none: they are not shown.
    """
    from rich.table import Table
    from rich.text import Text

    colours = {"finished": "green", "running": "cyan", "failed": "red", "killed": "red"}
    rows = {
        "run": [Text(one.path) for one in found],
        "status": [Text(one.status, colours.get(one.status, "")) for one in found],
        "recipe": [Text(one.recipe) for one in found],
        "model": [Text(f"{one.model} {show_count(one.parameters) if one.parameters else ''}".strip()) for one in found],
        "step": [Text(_steps(one)) for one in found],
        "loss": [Text("" if one.loss is None else f"{one.loss:.4f}") for one in found],
        "bits/byte": [Text("" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}") for one in found],
        "time": [Text(_clock(one.seconds)) for one in found],
        **({"settings": [Text(text) for text in settings]} if any(settings) else {}),
    }
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown = [name for name in rows if console.width >= _LEAST_WIDTH.get(name, 0)]
    for name in shown:
        is_number, folds = name in ("step", "loss", "bits/byte", "time"), name in ("run", "settings")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=not folds, overflow="fold")
    for row in zip(*(rows[name] for name in shown), strict=True):
        table.add_row(*row)
    console.print(table)
    for one in found:
        if one.reason:
            # The first sentence: what to do stands in run.json, and was said when it ended.
            console.print(f"{one.path}: {one.reason.partition('. ')[0]}", markup=False, highlight=False, soft_wrap=True)


def _steps(one: Summary) -> str:
    return "" if one.step is None else f"{one.step:,}" + (f"/{one.steps:,}" if one.steps else "")


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}" if minutes >= 60 else f"{minutes}:{left:02}"
