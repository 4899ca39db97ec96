"""A plot of layers: the loss without some adjacent ones, or the cosine distance of each one's input and output."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from plmtune.io.figures import COLOURS, MARKS, finish, new_figure
from plmtune.pruning.depth import Run

_CUT = "#d9d9d9"


def draw_rises(rises: Mapping[Run, float], kept: Collection[int], path: Path, *, tokens: int) -> None:
    """Draw the rise of the loss without each run of layers, at its middle layer, as a PNG.

    Args:
        kept: layers that stay; the others are shaded.
        tokens: that the rises were measured on.
    """
    figure, panel = _panel(len({first for first, n in rises if n == 1}), kept)
    for number, n in enumerate(sorted({n for _, n in rises})):
        points = [(first + (n - 1) / 2, rise) for (first, m), rise in sorted(rises.items()) if m == n]
        label = "one layer skipped" if n == 1 else f"{n} adjacent layers skipped"
        colour = COLOURS[number % len(COLOURS)]
        panel.plot(*zip(*points, strict=True), color=colour, marker=MARKS[number % 7], markersize=4, label=label)
    panel.set_ylabel(f"rise of the loss, nats a token, on {tokens:,} tokens")
    if max(rises.values()) > 20 * max(min(rises.values()), 1e-9):
        panel.set_yscale("symlog", linthresh=max(1e-3, max(rises.values()) / 1000))
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    finish(figure, path, whole=(panel.xaxis,))


def draw_influence(values: Sequence[float], kept: Collection[int], path: Path, *, tokens: int) -> None:
    """Draw the block influence of each layer as a PNG. Arguments as for `draw_rises`."""
    figure, panel = _panel(len(values), kept)
    panel.plot(range(len(values)), values, color=COLOURS[0], marker=MARKS[0], markersize=4, label="block influence")
    panel.set_ylabel(f"1 - cos(input, output), on {tokens:,} tokens")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    finish(figure, path, whole=(panel.xaxis,))


def _panel(num_layers: int, kept: Collection[int]) -> tuple[Any, Any]:
    figure = new_figure(9, 4.4)
    panel = figure.subplots()
    gone = [index for index in range(num_layers) if index not in kept]
    for index in gone:
        label = {"label": "cut"} if index == gone[0] else {}
        panel.axvspan(index - 0.5, index + 0.5, color=_CUT, linewidth=0, **label)
    panel.set_xlabel("layer")
    panel.set_xlim(-0.5, num_layers - 0.5)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel
