"""A picture of a comparison: scores with 95% intervals, and the differences to the first result beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plmtune.errors import UserError
from plmtune.evaluation.comparison import Z_95, Row
from plmtune.evaluation.result_table import labels, legend, metric_label
from plmtune.io.figures import finish, look, new_figure, widen

_ROW_INCHES = 0.28  # of a row, and again for each two results in it
_MAX_ROWS = 60


def draw(
    rows: Sequence[Row], results: Sequence[Mapping[str, Any]], path: Path, files: Sequence[Path] | None = None
) -> None:
    """Draw a comparison into a PNG: accuracies above, perplexities and other scales below.

    Args:
        files: of the results, if any.
    """
    rows = [row for row in rows if any(one and one.value is not None for one in row.scores)]
    if not rows:
        raise UserError("There is no score to draw: no task of these results ended with a number.")
    if len(rows) > _MAX_ROWS:
        raise UserError(f"{len(rows)} rows are too many for a picture, which shows {_MAX_ROWS}: leave out --all.")

    from matplotlib.lines import Line2D

    names = labels(results)
    parts = [part for part in ([r for r in rows if _is_share(r)], [r for r in rows if not _is_share(r)]) if part]
    compared = any(one and one.stderr is not None for row in rows for one in row.differences)
    what = legend(results, files)
    texts = [f"{name}  {text}" for name, text in zip(names, what, strict=True)] if len(names) > 1 else what
    texts = [textwrap.fill(text, 140 if compared else 95, subsequent_indent="    ") for text in texts]
    text_inches = 0.2 * sum(text.count("\n") + 1 for text in texts)
    row_inches = _ROW_INCHES * (1 + len(names) / 2)
    heights = [len(part) * row_inches + 0.5 for part in parts]
    figure = new_figure(11 if compared else 7.5, sum(heights) + 0.7 + text_inches)
    widths = [3, 2] if compared else [1]
    panels = figure.subplots(len(parts), len(widths), squeeze=False, height_ratios=heights, width_ratios=widths)
    for part, (scores, *differences) in zip(parts, panels, strict=True):
        _draw_scores(scores, part, len(names))
        if any(one and one.stderr is not None for row in part for one in row.differences):
            _draw_differences(differences[0], part, names)
        elif differences:
            differences[0].set_visible(False)
    handles = [Line2D([], [], **look(i), linestyle="none", label=text) for i, text in enumerate(texts)]
    figure.legend(handles=handles, loc="outside upper left", ncols=1, frameon=False, fontsize=9)
    finish(figure, path)


def _is_share(row: Row) -> bool:
    """Whether a row's scores are between 0 and 1 and higher is better, so that they fit on one axis."""
    values = [one.value for one in row.scores if one and one.value is not None]
    return row.higher_is_better is not False and all(0 <= value <= 1 for value in values)


def _draw_scores(panel: Any, rows: Sequence[Row], num: int) -> None:
    shares = _is_share(rows[0])
    for index, row in enumerate(rows):
        for i, one in enumerate(row.scores):
            if one is None or one.value is None:
                continue
            low = high = Z_95 * (one.stderr or 0.0)
            if shares:
                low, high = min(low, one.value), min(high, 1 - one.value)
            elif one.value > 0:
                low = min(low, one.value * 0.9)  # a logarithmic axis has no 0
            _bar(panel, one.value, (low, high), index, i, num)
    values = [one.value for row in rows for one in row.scores if one and one.value is not None]
    if not shares and min(values) > 0:
        panel.set_xscale("log")
        widen(panel)
    if shares:
        panel.set_xlim(left=min(-0.01, panel.get_xlim()[0]))
    panel.set_xlabel("score (bars: 95% interval)" if shares else "lower is better where ↓ (bars: 95% interval)")
    _finish(panel, rows)
    names = [f"{row.line.task}\n{metric_label(row.line, row.higher_is_better)}" for row in rows]
    panel.set_yticks(range(len(rows)), names, fontsize=9)


def _draw_differences(panel: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    shares = _is_share(rows[0])
    panel.axvline(0, color="0.5", linewidth=1)
    for index, row in enumerate(rows):
        for i, one in enumerate(row.differences):
            if one is None or one.stderr is None:
                continue
            first = row.scores[0].value if row.scores[0] else None
            if not shares and not first:
                continue
            # Other scales have no common unit, so each is relative to its first value.
            scale = 1.0 if shares else 100.0 / abs(first or 1.0)
            low = high = Z_95 * one.stderr * scale
            if shares:  # no share can differ by more than 1
                low, high = min(low, max(0.0, one.mean + 1)), min(high, max(0.0, 1 - one.mean))
            hollow = {} if one.paired else {"markerfacecolor": "white"}
            _bar(panel, one.mean * scale, (low, high), index, i, len(names), **hollow)
    unpaired = any(one and one.stderr is not None and not one.paired for row in rows for one in row.differences)
    unit = ("" if shares else " in %") + (" (hollow: unpaired)" if unpaired else "")
    panel.set_xlabel(f"difference to {names[0]}{unit}")
    _finish(panel, rows)
    panel.set_yticks(range(len(rows)), [])


def _finish(panel: Any, rows: Sequence[Row]) -> None:
    panel.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    for index in range(1, len(rows), 2):
        panel.axhspan(index - 0.5, index + 0.5, color="0.96", zorder=0)
    panel.grid(axis="x", alpha=0.25, linewidth=0.6)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _bar(panel: Any, value: float, ends: tuple[float, float], index: int, i: int, num: int, **style: Any) -> None:
    """Draw a value of result `i` in row `index`, the first on top as in the legend, and how far its bar reaches."""
    style = {**look(i), "markersize": 5, "linestyle": "none", "elinewidth": 1.3, "capsize": 2, **style}
    panel.errorbar(value, index + (i - (num - 1) / 2) * 0.7 / max(num, 2), xerr=[[end] for end in ends], **style)
