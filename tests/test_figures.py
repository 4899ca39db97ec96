"""Ticks can be read, and labels do not lie on each other."""

import itertools
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plmtune.figures import annotate, read_ticks, widen


def axes_of(values: list[float], scale: str) -> Any:
    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.scatter(values, values)
    axes.set_xscale(scale)
    axes.set_yscale(scale)
    widen(axes)
    return axes


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize(
    "values", [[40.0], [40.0, 40.0], [40.0, 42.0], [1.0, 1e4], [2e-3, 3e-3], [17.0, 23.5, 19.0], [1e5, 3e8]]
)
def test_an_axis_has_two_to_six_labels_that_do_not_overlap(values: list[float], scale: str) -> None:
    axes = axes_of(values, scale)
    read_ticks(axes.xaxis)
    axes.figure.canvas.draw()
    low, high = axes.get_xlim()
    labels = [label for label in axes.get_xticklabels() if label.get_text() and low <= label.get_position()[0] <= high]
    assert 2 <= len(labels) <= 6, [label.get_text() for label in labels]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("count", [1, 2, 40])
def test_labels_of_points_do_not_overlap_and_the_first_one_is_there(count: int) -> None:
    values = [1.0 + 0.01 * i for i in range(count)]
    axes = axes_of(values, "linear")
    annotate(axes, [(f"{i}: a name of a point", value, value) for i, value in enumerate(values)])
    axes.figure.canvas.draw()
    assert axes.texts[0].get_text().startswith("0:")
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
