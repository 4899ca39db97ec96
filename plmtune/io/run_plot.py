"""The plot of runs: score against predicted speed, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plmtune.io.figures import COLOURS, finish, new_figure
from plmtune.io.run_comparison import Group, Row, Score, front, groups


def drawn(rows: Sequence[Row]) -> list[Group]:
    """What a plot shows: finished runs with a score and a predicted speed, those together that differ in the seed."""
    return [group for group in groups(rows) if group.speed is not None]


def draw_runs(rows: Sequence[Row], score: Score, path: Path, title: str, *, bound: bool) -> None:
    """Draw the score of runs against their predicted speed; of several seeds the mean, and a line from least to most.

    Args:
        bound: the speeds are what memory allows at most.
    """
    found = drawn(rows)
    best = front(found, score)
    figure = new_figure(8, 5.4)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)

    def places(some: Sequence[Group]) -> tuple[list[float], list[float]]:
        return [group.speed or 0.0 for group in some], [group.score for group in some]

    least, most = ([pick(group.scores) for group in found] for pick in (min, max))
    axes.vlines(places(found)[0], least, most, color=COLOURS[0], linewidth=1)
    axes.scatter(*places(found), s=30, color=COLOURS[0], zorder=3)
    axes.plot(*places(best), color=COLOURS[1], linewidth=1.2, marker="o", markersize=9, markerfacecolor="none",
              label=f"Pareto front ({len(best)} of {len(found)})")  # fmt: skip
    axes.set_xlabel(
        "decode, at most tokens/s (the device is not calibrated)" if bound else "decode, predicted tokens/s"
    )
    seeds = ", mean and range of seeds" if any(len(group.rows) > 1 for group in found) else ""
    axes.set_ylabel(f"{score.shown}{seeds}")
    axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", fontsize=9)
    ordered = [*best, *(group for group in found if group not in best)]
    finish(figure, path, labels={axes: [(group.name, group.speed or 0.0, group.score) for group in ordered]})
