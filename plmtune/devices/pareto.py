"""The Pareto front of speed, memory and parameters, and plots of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from plmtune.devices.equal_shapes import LAYERS, WIDTH, Shape
from plmtune.devices.predict import Prediction
from plmtune.devices.sweep import Point
from plmtune.io.figures import COLOURS, finish, new_figure, widen
from plmtune.units import show_count

_LABELLED = 12  # more numbers than these would lie on each other


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: at least as fast, as small in memory and with as many parameters, and better in
    one. Parameters stand for quality, which nobody knows before training. Fastest first; what does not fit is left out.
    """
    fitting = [point for point in points if point.prediction.decode is not None]
    if not fitting:
        return []
    merits = np.array([(p.prediction.decode, -p.prediction.memory, p.parameters) for p in fitting], dtype=float)
    beaten = [((merits >= merit).all(axis=1) & (merits > merit).any(axis=1)).any() for merit in merits]
    kept = [point for point, worse in zip(fitting, beaten, strict=True) if not worse]
    return sorted(kept, key=lambda point: -(point.prediction.decode or 0.0))


def draw_front(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw decode speed against peak memory, parameters as colour, the front ringed; some points, the ends among
    them, carry their number in the front's table.
    """
    from matplotlib.colors import LogNorm

    fitting = [point for point in points if point.prediction.decode is not None]
    best = front(points)
    figure = new_figure(9, 6)
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    sizes = [point.parameters / 1e6 for point in fitting]
    shown = axes.scatter(
        *_spots(fitting).T,
        c=sizes,
        cmap="viridis",
        norm=LogNorm() if sizes and max(sizes) > 3 * min(sizes) else None,
        s=26,
        alpha=0.75,
        linewidths=0,
    )
    label = f"front of speed, memory and parameters ({len(best)} of {len(fitting)})"
    axes.scatter(*_spots(best).T, facecolors="none", edgecolors="#D55E00", linewidths=1.4, s=70, label=label)
    axes.set_xlabel("peak memory, MiB")
    # Speeds are bounds where nothing was measured: as the table says it.
    bound = any(point.prediction.is_bound for point in fitting)
    axes.set_ylabel("decode, at most tokens/s (the device is not calibrated)" if bound else "decode, tokens/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    widen(axes)
    axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", fontsize=9)
    if len(set(sizes)) > 1:
        figure.colorbar(shown, ax=axes, label="parameters, millions")
    # What is written first keeps its place: the ends of the front, then what lies between them.
    places = sorted({round(i) for i in np.linspace(0, len(best) - 1, min(_LABELLED, len(best)))})
    places = list(dict.fromkeys([*places[:1], *places[-1:], *places]))
    labels = [(f"{i + 1}: {show_count(best[i].parameters)}", *_spots(best)[i]) for i in places]
    finish(figure, path, labels={axes: labels})


def _spots(points: Sequence[Point]) -> npt.NDArray[np.float64]:
    """Memory in MiB and speed of each, [n, 2]."""
    spots = [(point.prediction.memory / 2**20, point.prediction.decode or 0.0) for point in points]
    return np.array(spots, dtype=float).reshape(-1, 2)


def draw_speeds(predictions: Sequence[Prediction], path: Path, title: str) -> None:
    """Draw decode speed against context, a panel a device, a line a scheme, its error as a band."""
    devices = list(dict.fromkeys(prediction.device for prediction in predictions))
    figure = new_figure(4.6 * max(len(devices), 1.6), 5.2)
    panels = figure.subplots(1, len(devices), squeeze=False)[0]
    figure.suptitle(title, fontsize=11)
    lines = list(dict.fromkeys((p.runtime, p.scheme) for p in predictions))
    for panel, device in zip(panels, devices, strict=True):
        for index, (runtime, scheme) in enumerate(lines):
            held = [p for p in predictions if (p.device, p.runtime, p.scheme) == (device, runtime, scheme)]
            held = sorted((p for p in held if p.decode is not None), key=lambda p: p.context)
            if not held:
                continue
            contexts = [p.context for p in held]
            speeds = np.array([p.decode for p in held], dtype=float)
            errors = np.array([p.error for p in held])
            colour, dashed = COLOURS[index % len(COLOURS)], "--" if runtime != "plmtune" else "-"
            bound = held[0].is_bound
            label = f"{runtime} {scheme}" + (", at most" if bound else "")
            panel.plot(contexts, speeds, dashed, color=colour, marker="o", markersize=4, label=label)
            if not bound:
                panel.fill_between(contexts, speeds * (1 - errors), speeds * (1 + errors), color=colour, alpha=0.08)
        panel.set_title(device, fontsize=10)
        panel.set_xlabel("tokens in the cache")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25, linewidth=0.6)
    panels[0].set_ylabel("decode, tokens/s")
    named = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", fontsize=8, ncols=4)
    contexts = sorted({prediction.context for prediction in predictions})
    finish(figure, path, at={panel.xaxis: contexts for panel in panels})


def draw_shapes(shapes: Sequence[Shape], predictions: Sequence[Prediction], path: Path, title: str) -> None:
    """Draw decode speed against depth, of shapes with equal parameters; the width stands beside each."""
    fitting = [(s, p) for s, p in zip(shapes, predictions, strict=True) if p.decode is not None]
    figure = new_figure(8, 5)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    places = [(shape.settings[LAYERS], prediction.decode or 0.0) for shape, prediction in fitting]
    axes.scatter(*np.array(places, dtype=float).reshape(-1, 2).T, s=30, color=COLOURS[0])
    axes.set_xlabel("layers")
    bound = any(prediction.is_bound for _, prediction in fitting)
    axes.set_ylabel("decode, at most tokens/s (the device is not calibrated)" if bound else "decode, tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    labels = [(f"width {shape.settings[WIDTH]:,}", *place) for (shape, _), place in zip(fitting, places, strict=True)]
    finish(figure, path, whole=[axes.xaxis], labels={axes: labels})
