"""A picture of a simulated step: what each process of the pipeline does when."""

from __future__ import annotations

from pathlib import Path

from plmtune.clusters.simulation import Simulated
from plmtune.io.figures import COLOURS, finish, new_figure

# What a span's name begins with -> its colour and its label.
_LOOKS = {
    "forward": (COLOURS[0], "forward"),
    "backward_weight": (COLOURS[2], "backward by weights"),
    "backward": (COLOURS[1], "backward"),
    "tp": (COLOURS[3], "tensor parallel collectives"),
    "cp": (COLOURS[5], "context parallel collectives"),
    "reduce": (COLOURS[4], "reduction of gradients"),
    "all-reduce": (COLOURS[4], "reduction of gradients"),
    "gather": (COLOURS[4], "gather of weights"),
    "tied": (COLOURS[4], "reduction of gradients"),
    "optimizer": (COLOURS[6], "optimizer"),
}
_MOST_ROWS = 32


def draw_timeline(simulated: Simulated, path: Path, title: str, processes: list[int]) -> None:
    """Draw some processes, a row each from the first one down.

    Args:
        processes: indices of simulated programs; of more than 32 the first ones are drawn.
    """
    rows = {process: row for row, process in enumerate(processes[:_MOST_ROWS])}
    figure = new_figure(9, 1.6 + 0.28 * len(rows))
    axes = figure.add_subplot()
    unit, name = (1e3, "ms") if simulated.makespan < 1 else (1.0, "s")
    drawn: dict[str, list[tuple[int, float, float]]] = {}
    for span in simulated.spans:
        if span.process in rows and span.end > span.start:
            start = next((prefix for prefix in _LOOKS if span.name.startswith(prefix)), "forward")
            drawn.setdefault(start, []).append((rows[span.process], span.start * unit, (span.end - span.start) * unit))
    labelled = set()
    for prefix, (colour, label) in _LOOKS.items():
        if prefix in drawn:
            places, starts, widths = zip(*drawn[prefix], strict=True)
            axes.barh(
                places, widths, left=starts, height=0.82, color=colour, edgecolor="white", linewidth=0.3,
                label=label if label not in labelled else None,
            )  # fmt: skip
            labelled.add(label)
    axes.set(xlabel=f"time, {name}", ylabel="process of the pipeline", title=title)
    axes.set_xlim(0, simulated.makespan * unit)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    finish(figure, path, whole=[axes.yaxis])
