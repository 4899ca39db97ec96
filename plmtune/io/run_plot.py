"""The plot of runs: score against predicted speed, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plmtune.io.figures import COLOURS, finish, new_figure
from plmtune.io.run_comparison import SCORE, SPEED, Row, Score, front, number


def drawn(rows: Sequence[Row]) -> list[Row]:
    """The runs that a plot shows: those that are finished and have a score and a predicted speed."""
    return [row for row in rows if row.counts and number(row.values.get(SPEED)) is not None]


def draw_runs(rows: Sequence[Row], score: Score, path: Path, title: str, *, bound: bool) -> None:
    """Draw the score of runs against their predicted speed.

    Args:
        bound: the speeds are what memory allows at most.
    """
    rows = drawn(rows)
    best = front(rows, score)
    figure = new_figure(8, 5.4)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)

    def places(some: Sequence[Row]) -> tuple[list[float], list[float]]:
        return [row.values[SPEED] for row in some], [row.values[SCORE] for row in some]

    axes.scatter(*places(rows), s=30, color=COLOURS[0], zorder=3)
    axes.plot(*places(best), color=COLOURS[1], linewidth=1.2, marker="o", markersize=9, markerfacecolor="none",
              label=f"Pareto front ({len(best)} of {len(rows)})")  # fmt: skip
    axes.set_xlabel(
        "decode, at most tokens/s (the device is not calibrated)" if bound else "decode, predicted tokens/s"
    )
    axes.set_ylabel(score.shown)
    axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", fontsize=9)
    ordered = [*best, *(row for row in rows if row not in best)]
    labels = [(row.shape or Path(row.summary.path).name, row.values[SPEED], row.values[SCORE]) for row in ordered]
    finish(figure, path, labels={axes: labels})
