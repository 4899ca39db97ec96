"""Shared parts of plots: canvas, colours and markers, readable ticks, and labels beside points.

A figure is made by `new_figure` and written by `finish`, which sees to the ticks of every axis and to the labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plmtune.io.atomic import atomic_write

# Okabe and Ito's colours, which colour-blind readers can distinguish, and shapes for prints without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vP*"

# Where a label may stand: offset from its point in points, and which of its ends is there.
_PLACES = [
    (sign * dx, dy, {1: "left", -1: "right", 0: "center"}[sign])
    for dx, dys in ((7, (5, -12)), (9, (-3,)), (7, (14, -21)), (12, (24, -31)))
    for dy in dys
    for sign in (1, -1)
] + [(0, dy, "center") for dy in (9, -17, 18, -26)]  # fmt: skip


def new_figure(width: float, height: float) -> Any:
    """Return a figure of that size in inches."""
    # Agg by its own canvas, not by pyplot: no window system, no global state, safe in a thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def look(number: int) -> dict[str, Any]:
    """The colour and marker of one of several results; the first 49 are distinct."""
    return {"color": COLOURS[number % 7], "marker": MARKS[(number + number // 7) % 7]}


def finish(
    figure: Any,
    path: Path,
    *,
    whole: Collection[Any] = (),
    at: Mapping[Any, Sequence[float]] | None = None,
    labels: Mapping[Any, Sequence[tuple[str, float, float]]] | None = None,
) -> None:
    """Set the ticks of every axis, write labels beside points, and write the figure as a PNG.

    Args:
        whole: axes (of the figure's panels) along which a fraction means nothing, such as steps.
        at: axis -> the values that are labelled, as many as there is room for, such as the contexts of measurements.
        labels: panel -> (text, x, y) of its points, the most important first.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    figure.draw_without_rendering()  # which lays the panels out
    for panel in panels_of(figure):
        for axis in (panel.xaxis, panel.yaxis):
            # Those of categories are chosen; a colour bar and a second scale have one axis.
            if not isinstance(axis.get_major_locator(), FixedLocator | NullLocator):
                read_ticks(axis, whole=axis in whole, at=(at or {}).get(axis, ()))
    if labels:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # what is placed now stays there
        for panel, texts in labels.items():
            annotate(panel, texts)
    with atomic_write(path, user_error=True) as temporary:
        figure.savefig(temporary, format="png")


def panels_of(figure: Any) -> Iterator[Any]:
    """The panels of a figure, their second scales and colour bars."""
    for panel in figure.axes:
        yield panel
        yield from panel.child_axes


def read_ticks(axis: Any, *, most: int = 6, whole: bool = False, at: Sequence[float] = ()) -> None:
    """Label between two and `most` ticks of an axis, as many as do not overlap, also of a logarithmic one that spans
    less than a decade. Call it when the limits of the axis are final and the figure is laid out.

    Args:
        whole: at whole numbers only.
        at: some of these values, if they are two or more.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    for allowed in range(most, 1, -1):
        if len(at) > 1:
            axis.set_major_locator(FixedLocator(at[:: -(-len(at) // allowed)]))
            axis.set_minor_locator(NullLocator())
        else:
            _locate(axis, allowed, whole)
        boxes = [label.get_window_extent().padded(2) for label in shown_labels(axis)]
        if not any(one.overlaps(other) for one, other in itertools.pairwise(boxes)):
            return


def shown_labels(axis: Any) -> list[Any]:
    """The visible tick labels of an axis."""
    low, high = sorted(axis.get_view_interval())
    room, along = (high - low) * 1e-9, "xy".index(axis.axis_name)
    return [
        label
        for label in axis.get_majorticklabels()
        if label.get_text() and low - room <= label.get_position()[along] <= high + room
    ]


def _locate(axis: Any, most: int, whole: bool) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() != "log":
        axis.set_major_locator(MaxNLocator(most - 1, integer=whole, steps=[1, 2, 2.5, 5, 10]))
        return
    found: list[float] = []
    for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        ticks = [tick for tick in LogLocator(subs=subs).tick_values(low, high) if low <= tick <= high]
        if len(ticks) <= most or not found:
            found = ticks
    if len(found) < 3:  # so few decades that a linear scale has the rounder numbers
        found = [tick for tick in MaxNLocator(most - 1).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(found[:: -(-len(found) // most)]))
    axis.set_minor_locator(NullLocator())


def _number(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.10g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.10g}"


def widen(axes: Any) -> None:
    """Widen an axis whose values are all equal."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_data_interval())
        if axis.get_scale() == "log" and 0 < low <= high < low * 1.01:
            axis.set_view_interval(low / 1.1, high * 1.1, ignore=True)


def annotate(axes: Any, labels: Sequence[tuple[str, float, float]], *, fontsize: float = 8) -> None:
    """Write each text (text, x, y) beside its point, where it covers no other text and no point, and if there is such
    a place no line; one without a place is left out. Call it when the figure is laid out.
    """
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    taken = [axes.get_legend().get_window_extent(renderer)] if axes.get_legend() else []
    taken += point_boxes(axes)
    paths = [line.get_path().transformed(line.get_transform()) for line in axes.lines if line.get_linestyle() != "None"]
    for text, x, y in labels:
        note = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=fontsize, in_layout=False,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
        )  # fmt: skip
        free = None
        for dx, dy, ha in _PLACES:
            note.set(position=(dx, dy), ha=ha)
            box = note.get_window_extent(renderer).padded(1)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                crossed = any(path.intersects_bbox(box, filled=False) for path in paths)
                if free is None or not crossed:
                    free = (dx, dy, ha, box)
                if not crossed:
                    break
        if free is None:
            note.remove()
        else:
            note.set(position=free[:2], ha=free[2])
            taken.append(free[3])


def point_boxes(axes: Any) -> list[Any]:
    """The boxes of the marks in a panel, in pixels."""
    from matplotlib.transforms import Bbox

    centres = []
    for line in axes.lines:
        if line.get_marker() not in ("None", None, "", " "):
            centres += [
                (*centre, line.get_markersize() / 2) for centre in line.get_transform().transform(line.get_xydata())
            ]
    for marks in axes.collections:
        sizes = marks.get_sizes() if hasattr(marks, "get_sizes") else ()
        if len(marks.get_offsets()) and len(sizes):
            places = marks.get_offset_transform().transform(marks.get_offsets())
            centres += [(*centre, max(sizes) ** 0.5 / 2) for centre in places]
    scale = axes.figure.dpi / 72
    return [Bbox.from_extents(x - r * scale, y - r * scale, x + r * scale, y + r * scale) for x, y, r in centres]
