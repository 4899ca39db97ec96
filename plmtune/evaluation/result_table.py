"""The table of one or several results, and its rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plmtune.io.tables import Column, Table

_REASON_LENGTH = 100
_BESIDE = 2  # more results than these are shown below each other


@dataclass(frozen=True)
class Score:
    """A metric of a task or group. `value` is None if it was not finite, `stderr` if lm-eval gives none."""

    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    samples: int


@dataclass(frozen=True)
class Line:
    """A row of a table: a metric of a task or group; `depth` is its depth in groups."""

    task: str
    metric: str
    depth: int = 0


def labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label of each result for tables: the model's name of a single one, else A, B, C (see `legend`)."""
    if len(results) == 1:
        return [_name(results[0])]
    return [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(results))]


def legend(results: Sequence[Mapping[str, Any]], files: Sequence[Path] | None = None) -> list[str]:
    """Describe each result: its file (or its model without one), its limit, and its time."""
    out = []
    for i, result in enumerate(results):
        limit = result["settings"].get("limit")
        parts = [
            str(files[i]) if files else _name(result),
            f"limit {limit}" if limit is not None else "",
            str(result.get("started") or "")[:16].replace("T", " "),
        ]
        out.append(" · ".join(part for part in parts if part))
    return out


def _name(result: Mapping[str, Any]) -> str:
    """Return the name of its model, with the step unless the name contains it."""
    name, step = str(result["model"].get("name") or "model"), result["model"].get("step")
    return name if step is None or re.search(rf"step[- ]?0*{step}(?!\d)", name) else f"{name}, step {step}"


def score(result: Mapping[str, Any], line: Line) -> Score | None:
    entry = entry_of(result, line.task)
    found = entry.get("metrics", {}).get(line.metric)
    if not found:
        return None
    return Score(found["value"], found.get("stderr"), found.get("higher_is_better"), entry.get("samples") or 0)


def lines(results: Sequence[Mapping[str, Any]], *, all_tasks: bool = False) -> list[Line]:
    """Return the rows of a table: tasks and groups in the order of the files, with their metrics.

    Args:
        all_tasks: also the tasks of a group, after it. MMLU has 57.
    """
    found: dict[Line, None] = {}

    def visit(result: Mapping[str, Any], name: str, depth: int) -> None:
        entry = result["groups"].get(name) or result["tasks"].get(name)
        if entry is None:
            return
        for metric in entry["metrics"]:
            found.setdefault(Line(name, metric, depth))
        if all_tasks:
            for child in entry.get("tasks", ()):
                if depth < 8:  # no real group is as deep, and a damaged file may contain itself
                    visit(result, child, depth + 1)

    for result in results:
        children = {child for group in result["groups"].values() for child in group["tasks"]}
        for name in (*result["groups"], *result["tasks"]):
            if name not in children:
                visit(result, name, 0)
    return list(found)


def metric_label(line: Line, higher_is_better: bool | None) -> str:
    """`exact_match,strict-match` -> `exact_match (strict-match) ↑`; the arrow points to better values."""
    metric, _, chosen_by = line.metric.partition(",")
    arrow = {True: " ↑", False: " ↓", None: ""}[higher_is_better]
    return metric + (f" ({chosen_by})" if chosen_by not in ("", "none") else "") + arrow


def direction(found: Sequence[Score | None]) -> bool | None:
    """Whether higher is better, according to the first result with the metric."""
    return next((one.higher_is_better for one in found if one), None)


def show_score(one: Score | None) -> str:
    if one is None:
        return "-"
    if one.value is None:
        return "not finite"
    return show_number(one.value) + (f" ± {show_number(one.stderr)}" if one.stderr is not None else "")


def show_number(value: float) -> str:
    """Format with four decimals, or as 1.234e+05 from 1e5 on, as of perplexities of untrained models."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def table(
    results: Sequence[Mapping[str, Any]], files: Sequence[Path] | None = None, *, all_tasks: bool = False
) -> list[Table | str]:
    """Return a table of results: value ± standard error of each metric, and failures with reasons below.

    Up to two results are side by side, more are below each other, to fit into 80 columns; a legend is above.

    Args:
        files: of the results, if any.
    """
    names = [
        label + (" (partial)" if result["status"] == "partial" else "")
        for label, result in zip(labels(results), results, strict=True)
    ]
    beside = len(results) <= _BESIDE
    what = [Column("task", key=True), Column("shots", right=True, drop=1), Column("metric", folds=True)]
    grid = Table([*what, Column("n", right=True, drop=2), *(names if beside else ("result", "score"))])
    before = ""
    for line in lines(results, all_tasks=all_tasks):
        found = [score(result, line) for result in results]
        shots = [entry_of(result, line.task).get("num_fewshot") for result in results]
        name, before = ("" if line.task == before else "  " * line.depth + line.task), line.task
        metric = metric_label(line, direction(found))
        if beside:
            there = [shot for shot, one in zip(shots, found, strict=True) if one]
            counts = _distinct([one.samples for one in found if one])
            grid.add(name, _distinct(there) if name else "", metric, counts, *map(show_score, found))
            continue
        for label, shot, one in zip(names, shots, found, strict=True):
            if one:
                shown = _distinct([shot]) if metric else ""
                grid.add(name, shown, metric, str(one.samples), label, show_score(one))
                name = metric = ""
    failures = [
        f"{task} failed" + (f" ({label})" if len(results) > 1 else "") + f": {_in_short(str(reason))}"
        for label, result in zip(labels(results), results, strict=True)
        for task, reason in result["failed"].items()
    ]
    if beside:
        for task in dict.fromkeys(task for result in results for task in result["failed"]):
            grid.add(task, "", "", "", *("failed" if task in result["failed"] else "-" for result in results))
    if len(results) == 1:
        return [grid, *failures]
    above = Table(["", Column("", folds=True)], headings=False)
    for label, text in zip(labels(results), legend(results, files), strict=True):
        above.add(label, text)
    return [above, "", grid, *failures]


def _in_short(reason: str) -> str:
    """Return its first sentence; the file has all of it."""
    first = re.split(r"\n|(?<=\.)\s+(?=[A-Z])", reason.strip(), maxsplit=1)[0]
    return first if len(first) <= _REASON_LENGTH else first[: _REASON_LENGTH - 1] + "…"


def entry_of(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the entry of a task or group; empty if there is none."""
    entry: dict[str, Any] = result["tasks"].get(name) or result["groups"].get(name) or {}
    return entry


def _distinct(values: Sequence[Any]) -> str:
    """Return the value if all are equal, else the values of all results."""
    shown = ["?" if value is None else str(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else "/".join(shown)
