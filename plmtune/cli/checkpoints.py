"""``plmtune checkpoints``: list what a run has saved and verify it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from plmtune.cli.options import PATH, newest_run, option
from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.io.run_summary import explain, explain_missing
from plmtune.io.tables import Cell, Column, Table, show
from plmtune.io.terminal import Progress
from plmtune.io.untrusted import load_json
from plmtune.units import show_bytes


@dataclass
class Entry:
    """One checkpoint."""

    path: Path
    content: dict[str, Any]  # of its manifest; empty where that cannot be read
    damage: str = ""  # what is wrong with it
    loss: Any = None

    @property
    def size(self) -> int:
        return sum(file["bytes"] for file in self.content.get("files", {}).values())


@click.command()
@click.argument("run", type=PATH, required=False, metavar="[RUN]")
@option("--quick", "Compare file sizes only, without hashing.")
def checkpoints(run: Path | None, quick: bool) -> None:
    """List the checkpoints of RUN (a run, its checkpoints folder, or one checkpoint) and verify them.

    RUN defaults to the newest finished run. The exit code is 2 if a checkpoint is damaged.

    \b
    plmtune checkpoints runs/demo/latest
    plmtune checkpoints runs/demo/latest --quick
    """
    run = run or Path(newest_run("checkpoints RUN"))
    entries = [_look(path) for path in _find(run)]
    total, read = sum(entry.size for entry in entries), 0
    with Progress() as progress:

        def advance(size: int) -> None:
            nonlocal read
            read += size
            progress.update(f"reading {show_bytes(read)} of {show_bytes(total)}")

        for entry in entries:
            if not entry.damage:
                try:
                    manifest.check_files(entry.path, hashes=not quick, seen=advance)
                except UserError as error:
                    entry.damage = str(error)
    damaged = [entry for entry in entries if entry.damage]
    show(_table(entries, "sizes match" if quick else "whole"), *(entry.damage for entry in damaged))
    if damaged:
        left = len(entries) - len(damaged)
        means = f"Resume takes the newest of the other {left}." if left else "No other is left to resume from."
        raise UserError(f"{run}: {len(damaged)} of {len(entries)} checkpoints damaged. {means}")


def _find(run: Path) -> list[Path]:
    run = manifest.resolve_pointer(run)
    if (run / manifest.NAME).is_file():
        return [run]
    directory = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = [manifest.step_path(directory, step) for step in manifest.steps(directory)]
    if not found:
        raise UserError(
            explain(run)
            or explain_missing(run)
            or f"{run} holds no checkpoints. Give a run (runs/demo/latest), or one of its checkpoints."
        )
    return found


def _look(path: Path) -> Entry:
    """Read a checkpoint's manifest and metrics. They are not trusted here: they are verified later."""
    try:
        entry = Entry(path, manifest.read(path))
    except UserError as error:
        return Entry(path, {}, str(error))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        entry.loss = load_json((path / "state.json").read_text(encoding="utf-8")).get("metrics").get("validation_loss")
    return entry


def _table(entries: list[Entry], whole: str) -> Table:
    figures = [Column("size", right=True), Column("files", right=True, drop=1), Column("validation loss", right=True)]
    table = Table([Column("step", right=True), Column("saved", drop=2), *figures, "state"])
    for entry in entries:
        path, content = entry.path, entry.content
        cells = [path.name, "", "", ""]
        if content:
            saved = time.localtime((path / manifest.NAME).stat().st_mtime)
            cells = [f"{content['step']:,}", time.strftime("%Y-%m-%d %H:%M", saved), show_bytes(entry.size)]
            cells.append(str(len(content["files"]) + 1))
        loss = f"{entry.loss:.4f}" if isinstance(entry.loss, int | float) else ""
        marks = [mark for mark in ("latest", "best") if manifest.resolve_pointer(path.parent / mark) == path]
        state = ", ".join(["damaged" if entry.damage else whole, *marks])
        table.add(*cells, loss, Cell(state, "red" if entry.damage else "green"))
    return table
