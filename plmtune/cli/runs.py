"""``plmtune runs``: which runs there are, and how it stands with each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from plmtune.cli.options import PATH, print_json_option
from plmtune.errors import UserError
from plmtune.io.run_summary import Summary, find_runs, summarize
from plmtune.io.tables import Cell, Column, Table, numbers, show
from plmtune.units import show_count, show_duration


@click.command()
@click.argument("directory", type=PATH, default=Path("runs"), metavar="[DIR]")
@print_json_option
def runs(directory: Path, as_json: bool) -> None:
    """List the runs in DIR (default: runs), the oldest first.

    A failed run is listed with its reason. A run has the status "killed" if it recorded no end and its process is gone.
    The column "step" holds the last logged step. "saved step" is the step of the newest checkpoint: resume continues
    from it, and other commands read it.

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
        show(table(found), *reasons(found))
    else:
        raise UserError(f"There are no runs in {directory}. Start one: plmtune run pretrain")


def table(found: Sequence[Summary], settings: Sequence[str] = ()) -> Table:
    """A row for each run, with the settings that are its own where these are given."""
    rows = Table(
        [
            Column("run", key=True),
            "status",
            Column("recipe", drop=1),
            Column("model", drop=3),
            *numbers({"step": 0, "saved step": 0, "loss": 0, "bits a byte": 2, "time": 4}),
            *([Column("settings", folds=True)] if any(settings) else []),
        ]
    )
    colours = {"finished": "green", "failed": "red", "killed": "red"}
    for one, own in zip(found, settings or [""] * len(found), strict=True):
        rows.add(
            one.path,
            Cell(one.status, colours.get(one.status, "")),
            one.recipe,
            f"{one.model} {show_count(one.parameters) if one.parameters else ''}".strip(),
            "" if one.step is None else f"{one.step:,}" + (f"/{one.steps:,}" if one.steps else ""),
            "" if one.saved_step is None else f"{one.saved_step:,}",
            "" if one.loss is None else f"{one.loss:.4f}",
            "" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}",
            "" if one.seconds is None else show_duration(one.seconds),
            *([own] if any(settings) else []),
        )
    return rows


def reasons(found: Sequence[Summary]) -> list[str]:
    """Why runs failed, a line each. run.json holds the whole text."""
    return [f"{one.path}: {one.reason.partition('. ')[0]}" for one in found if one.reason]
