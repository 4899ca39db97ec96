"""The table of runs that ``plmtune runs`` and a multirun print."""

from __future__ import annotations

from collections.abc import Sequence

from plmtune.io.run_summary import Summary
from plmtune.io.tables import Cell, Column, Table, numbers
from plmtune.units import show_count, show_duration

_COLOURS = {"finished": "green", "failed": "red", "killed": "red"}


def status_cell(status: str) -> Cell:
    return Cell(status, _COLOURS.get(status, ""))


def table(found: Sequence[Summary], settings: Sequence[str] = ()) -> Table:
    """A row for each run, with the settings that are its own where these are given."""
    shaped, counted = any(one.shape for one in found), any(one.tokens for one in found)
    queued = any(one.queue for one in found)
    rows = Table(
        [
            Column("run", key=True),
            "status",
            Column("recipe", drop=1),
            Column("model", drop=4),
            *([Column("shape", right=True, drop=3)] if shaped else []),
            *numbers({"step": 0, "saved step": 0}),
            *numbers({"tokens": 2} if counted else {}),
            *numbers({"loss": 0, "bits a byte": 2, "time": 5}),
            *(["queue"] if queued else []),
            *([Column("settings", folds=True)] if any(settings) else []),
        ]
    )
    for one, own in zip(found, settings or [""] * len(found), strict=True):
        rows.add(
            one.path,
            status_cell(one.status),
            one.recipe,
            f"{one.model} {show_count(one.parameters) if one.parameters else ''}".strip(),
            *([one.shape] if shaped else []),
            "" if one.step is None else f"{one.step:,}" + (f"/{one.steps:,}" if one.steps else ""),
            "" if one.saved_step is None else f"{one.saved_step:,}",
            *([show_count(one.tokens) if one.tokens else ""] if counted else []),
            "" if one.loss is None else f"{one.loss:.4f}",
            "" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}",
            "" if one.seconds is None else show_duration(one.seconds),
            *([one.queue or ""] if queued else []),
            *([own] if any(settings) else []),
        )
    return rows


def reasons(found: Sequence[Summary]) -> list[str]:
    """Why runs failed, a line each. run.json holds the whole text."""
    return [f"{one.path}: {one.reason.partition('. ')[0]}" for one in found if one.reason]
