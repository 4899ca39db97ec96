"""What the project's figures share: axes whose ticks can be read, and labels that do not lie on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def read_ticks(axis: Any, *, most: int = 6) -> None:
    """Label between two and `most` ticks of an axis, also of a logarithmic one that spans less than a decade.

    Call it when the limits of the axis are final.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log":
        found: list[float] = []
        for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
            ticks = [tick for tick in LogLocator(subs=subs).tick_values(low, high) if low <= tick <= high]
            if len(ticks) <= most or not found:
                found = ticks
        if len(found) < 3:  # so few decades that a linear scale has the rounder numbers
            found = [t for t in MaxNLocator(most - 1).tick_values(low, high) if low <= t <= high]
        axis.set_major_locator(FixedLocator(found[:: -(-len(found) // most)]))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(most - 1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}" if abs(value) < 1e6 else f"{value:.3g}"))


def widen(axes: Any) -> None:
    """Give an axis whose values are all equal room on both sides."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_data_interval())
        if axis.get_scale() == "log" and 0 < low <= high < low * 1.2:
            axis.set_view_interval(low / 1.5, high * 1.5, ignore=True)


def annotate(axes: Any, labels: Sequence[tuple[str, float, float]], *, fontsize: float = 8) -> None:
    """Write each text (text, x, y) beside its point where it covers no other text; one without such a place is left
    out. Call it when the limits of the axes are final.
    """
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    taken = [axes.get_legend().get_window_extent(renderer)] if axes.get_legend() else []
    for text, x, y in labels:
        for dx, dy, ha in ((7, 6, "left"), (7, -13, "left"), (-7, 6, "right"), (-7, -13, "right"), (0, 16, "center"),
                           (0, -24, "center")):  # fmt: skip
            note = axes.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, fontsize=fontsize,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
            )  # fmt: skip
            box = note.get_window_extent(renderer)
            free = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if free and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()
