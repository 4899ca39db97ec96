"""A picture of measurements: decode speed by context, a line for each target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plmtune.atomic import writing
from plmtune.devices.measure import Measurement

# Colours that colour-blind readers tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = "osD^vPX*"


def draw(found: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw `found` into `path` (a PNG), and beside it the prompts' speed where some were read.

    Raises:
        UserError: if the file cannot be written.
    """
    # Agg by its own canvas, not by pyplot: no window system, no global state, safe in a thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, StrMethodFormatter

    lines: dict[str, list[Measurement]] = {}
    for entry in found:
        name = Path(entry.target).name if len(Path(entry.target).name) > 12 else entry.target
        sparse = f", {entry.sparse[0]} of {entry.sparse[1]} layers sparse" if entry.sparse and entry.sparse[0] else ""
        lines.setdefault(f"{name} ({entry.runtime.split(' ')[0]}, {entry.weights}{sparse})", []).append(entry)
    panels = [("decode", "tokens/s written")]
    if any(entry.prefill for entry in found):
        panels.append(("prefill", "tokens/s of the prompt read"))
    figure = Figure(figsize=(6 * len(panels), 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    contexts = sorted({entry.context for entry in found})
    for axes, (field, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (name, entries) in enumerate(lines.items()):
            points = [(e.context, getattr(e, field)) for e in entries if getattr(e, field)]
            if points:
                colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
                axes.plot(*zip(*points, strict=True), color=colour, marker=mark, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(contexts))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7, ncols=2)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png")
