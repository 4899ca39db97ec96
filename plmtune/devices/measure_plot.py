"""A picture of measurements: decode speed by context, a line for each target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plmtune.devices.measure import Measurement
from plmtune.io.figures import finish, look, new_figure, widen


def draw(found: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw `found` into `path` (a PNG), and beside it the prompts' speed where some were read."""
    lines: dict[str, list[Measurement]] = {}
    for entry in found:
        name = Path(entry.target).name if len(Path(entry.target).name) > 12 else entry.target
        sparse = f", {entry.sparse[0]} of {entry.sparse[1]} layers sparse" if entry.sparse and entry.sparse[0] else ""
        lines.setdefault(f"{name} ({entry.runtime.split(' ')[0]}, {entry.weights}{sparse})", []).append(entry)
    panels = [("decode", "tokens/s written")]
    if any(entry.prefill for entry in found):
        panels.append(("prefill", "tokens/s of the prompt read"))
    figure = new_figure(6 * len(panels), 4.8 + 0.16 * max(0, len(lines) - 4))
    figure.suptitle(title, fontsize=10)
    for axes, (field, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (name, entries) in enumerate(lines.items()):
            points = [(e.context, getattr(e, field)) for e in entries if getattr(e, field)]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, **look(number))
        axes.set_xscale("log")
        widen(axes)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7, ncols=2)
    contexts = sorted({entry.context for entry in found})
    finish(figure, path, at={axes.xaxis: contexts for axes in figure.axes})
