"""One picture of a run: losses, learning rate, sparsity of the FFN, and what preference training measures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plmtune.errors import UserError
from plmtune.io import metrics
from plmtune.io.figures import COLOURS, finish, new_figure

_TRAIN, _VALIDATION, _RATE, _OTHER = COLOURS[:4]
_ROOM = 1.01
# Held-out data has hollow markers in every panel; training data is a line, or full dots where a run is short.
_HELD_OUT: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white"}
# The contexts of an answer in the metrics of preference training, and how they are drawn.
_CONTEXTS = {"": ("direct", _TRAIN), "given_rejected/": ("given the worse", _OTHER),
             "given_chosen/": ("given the better", _RATE)}  # fmt: skip


def draw_curves(source: Path, target: Path) -> None:
    """Draw `source` (metrics.jsonl) into `target` (a PNG), with the end of the run directory's path as title."""
    try:
        entries = metrics.read(source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read: {error}.") from error
    training = [e for e in entries if e.get("loss") is not None]
    validations = [e for e in entries if e.get("validation_loss") is not None]
    if not training:
        raise UserError(f"{source} holds no training loss yet, so there is nothing to draw.")

    axis, unit = _x_axis(training)
    layers = sparsity_layers(validations)
    rounds = [e for e in entries if e.get("direct") is not None]
    tasks = [e for e in entries if any(key.startswith("eval/") for key in e)]
    wanted: list[tuple[float, Callable[[Any], None]]] = [  # heights, and what draws into a panel
        (3.2, lambda panel: _draw_losses(panel, training, validations, axis)),
        (1.0, lambda panel: _draw_rates(panel, training, axis)),
    ]
    if any("divergence" in e for e in training):
        wanted.append((1.6, lambda panel: _draw_distillation(panel, training, axis)))
    if layers:
        measured = [e for e in validations if layers[0] in e]
        wanted.append((1.0, lambda panel: _draw_sparsity(figure, panel, measured, layers, axis)))
    if any("accuracy" in e for e in training):
        wanted.append((1.6, lambda panel: _draw_accuracy(panel, training, validations, axis)))
    if rounds:
        wanted.append((1.6, lambda panel: _draw_rewards(panel, rounds)))
    if tasks:
        wanted.append((1.6, lambda panel: _draw_tasks(panel, tasks, axis)))
    heights, draws = zip(*wanted, strict=True)
    figure = new_figure(9, 1.1 + 1.15 * sum(heights))
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.suptitle("/".join(source.resolve().parent.parts[-2:]), fontsize=12)
    for panel, draw in zip(panels, draws, strict=True):
        draw(panel)
    for before, entry in itertools.pairwise(training):
        if before.get("phase") != entry.get("phase"):
            for panel in panels:
                panel.axvline(axis(before), color="0.6", linewidth=0.8, linestyle=":", zorder=0)
            panels[0].annotate(
                f" {entry.get('phase')}",
                (axis(before), 0.01),
                xycoords=("data", "axes fraction"),
                color="0.4",
                fontsize=8,
            )
    # A little more than the last point, whose dot would be cut in half.
    panels[-1].set_xlim(0, _ROOM * max(axis(e) for e in (*training, *validations, *tasks)))
    panels[-1].set_xlabel(unit)

    finish(figure, target, whole=[panels[-1].xaxis] if unit == "step" else [])


def draw_losses(losses: Any, drawn: Any, target: Path, *, title: str) -> None:
    """Draw a histogram of the losses of sequences, with the drawn ones in front, into `target` (a PNG)."""
    import numpy as np

    figure = new_figure(6, 3.5)
    panel = figure.subplots()
    edges = np.histogram_bin_edges(losses, bins=60)
    for values, label, colour in ((losses, "all", COLOURS[5]), (drawn, "drawn", _VALIDATION)):
        panel.hist(
            values, bins=edges, color=colour, alpha=0.7, label=f"{label}: {len(values):,}, mean {values.mean():.3f}"
        )
    panel.set_xlabel("loss (nats a token)")
    panel.set_title(title)
    _finish(panel, "sequences", fontsize=9)
    finish(figure, target)


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over up to `reach` neighbours a side. Centred, as a trailing mean lags where a loss falls."""
    sums = [0.0, *itertools.accumulate(values)]
    out = []
    for i in range(len(values)):
        left = min(reach, i)  # near the steep start no further to the right than to the left
        first, last = i - left, min(i + left, len(values) - 1)
        out.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return out


def sparsity_layers(validations: Sequence[dict[str, Any]]) -> list[str]:
    """The keys sparsity/0, sparsity/1, ... that were logged, in order of layer."""
    keys = {key for e in validations for key in e if key.startswith("sparsity/")}
    return sorted(keys, key=lambda key: int(key.partition("/")[2]))


def _x_axis(training: Sequence[dict[str, Any]]) -> tuple[Any, str]:
    """A function from a line to its place on the x axis, and the axis label: tokens where every line has them."""
    last = training[-1].get("tokens")
    if not last or not all("tokens" in e for e in training):
        return (lambda e: e["step"]), "step"
    # Validations are logged without tokens of their own: they stand at their step.
    per_step = last / max(training[-1]["step"], 1)
    size, name = next((s, n) for s, n in ((1e9, "billion "), (1e6, "million "), (1, "")) if last >= s)
    return (lambda e: e.get("tokens", e["step"] * per_step) / size), f"{name}tokens"


def _draw(
    panel: Any, entries: Sequence[dict[str, Any]], axis: Any, key: str, *, smoothed: bool = False, **style: Any
) -> None:
    """Draw a metric of the lines that have it."""
    there = [e for e in entries if e.get(key) is not None]
    values = [e[key] for e in there]
    if len(there) < 3:  # a line of one point is invisible
        style = {"marker": "o", "markersize": 3.5, **style}
    panel.plot([axis(e) for e in there], smooth(values, len(values) // 40) if smoothed else values, **style)


def _finish(panel: Any, label: str, *, legend: bool = True, **settings: Any) -> None:
    """Label a panel, and draw its grid."""
    panel.set_ylabel(label)
    if legend:
        panel.legend(frameon=False, **{"fontsize": 8, **settings})
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_losses(panel: Any, training: Sequence[Any], validations: Sequence[Any], axis: Any) -> None:
    # Of a run with a teacher, the part of the loss that a validation measures, too.
    key = "cross_entropy" if any("divergence" in e for e in training) else "loss"
    losses = [e[key] for e in training if e.get(key) is not None]
    many = len(losses) > 20
    if many:
        _draw(panel, training, axis, key, color=_TRAIN, alpha=0.25, linewidth=0.8)
    label = ("training" if key == "loss" else "training, cross entropy") + (" (smoothed; raw behind)" if many else "")
    _draw(panel, training, axis, key, smoothed=many, color=_TRAIN, linewidth=1.6, label=label)
    if validations:
        final = validations[-1]
        bits = final.get("bits_per_byte")
        label = f"validation, at the end {final['validation_loss']:.3f}"
        if bits is not None:
            label += f" = {bits:.3f} bits a byte"
        _draw(panel, validations, axis, "validation_loss", color=_VALIDATION, linewidth=1, label=label, **_HELD_OUT)
        if (averaged := final.get("ema_validation_loss")) is not None:
            label = f"validation of averaged weights, at the end {averaged:.3f}"
            style: dict[str, Any] = {"color": _RATE, "linewidth": 1, "linestyle": "--", **_HELD_OUT}
            _draw(panel, validations, axis, "ema_validation_loss", label=label, **style)
        if bits and final["validation_loss"]:
            # Bits per byte is the same loss in another unit, so one curve reads on both scales.
            ratio = bits / final["validation_loss"]
            second = panel.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio))
            second.set_ylabel("bits per byte")
    _finish(panel, "loss a pair" if "pairs" in training[0] else "loss (nats a token)", fontsize=9)
    if many:
        # The first steps of a fresh model are far above all that follows; the curve of interest is below.
        highest = min(max(losses), 1.05 * max(smooth(losses, len(losses) // 40)))
        held_out = [
            e[k] for e in validations for k in ("validation_loss", "ema_validation_loss") if e.get(k) is not None
        ]
        panel.set_ylim(top=max([highest, *(1.01 * value for value in held_out)]))


def _draw_distillation(panel: Any, training: Sequence[Any], axis: Any) -> None:
    """The divergence from the teacher, and the difference of hidden states where it is part of the loss."""
    labels = {"divergence": "divergence from the teacher", "hidden_difference": "difference of hidden states"}
    for (key, label), colour in zip(labels.items(), (_OTHER, _RATE), strict=True):
        if any(key in e for e in training):
            _draw(panel, training, axis, key, smoothed=len(training) > 20, color=colour, linewidth=1.4, label=label)
    panel.set_ylim(bottom=0)
    _finish(panel, "nats a token", ncols=2)


def _draw_rates(panel: Any, training: Sequence[Any], axis: Any) -> None:
    """The learning rate, and that of each further group of parameters."""
    names = sorted({key for e in training for key in e if key == "lr" or key.startswith("lr/")})
    for name, colour in zip(names, itertools.cycle(COLOURS[2:]), strict=False):
        _draw(panel, training, axis, name, color=colour, linewidth=1.4, label=name)
    panel.set_ylim(bottom=0)
    if len(names) > 1:
        panel.set_ylim(top=1.4 * panel.get_ylim()[1])  # above the lines
    _finish(panel, "learning rate", legend=len(names) > 1, ncols=len(names), loc="upper right")


def _draw_accuracy(panel: Any, training: Sequence[Any], validations: Sequence[Any], axis: Any) -> None:
    """How often the chosen answer is preferred, in each context."""
    for prefix, (label, colour) in _CONTEXTS.items():
        if any(f"{prefix}accuracy" in e for e in training):
            style = {"color": colour, "linewidth": 1.4, "label": label}
            _draw(panel, training, axis, f"{prefix}accuracy", smoothed=True, **style)
        _draw(panel, validations, axis, f"validation/{prefix}accuracy", color=colour, linestyle="none", **_HELD_OUT)
    panel.set_ylim(-0.02, 1.02)
    _finish(panel, "accuracy\n(hollow: held out)", ncols=3)


def _draw_rewards(panel: Any, rounds: Sequence[Any]) -> None:
    """Rewards of direct and refined answers to held-out prompts after each round, at the step where it ended."""
    for key, colour in {"direct": _TRAIN, "refined": _RATE}.items():
        _draw(panel, rounds, lambda e: e["step"], key, color=colour, label=f"{key} answers", **_HELD_OUT)
    _finish(panel, "reward\nafter rounds", ncols=2)


def _draw_tasks(panel: Any, entries: Sequence[dict[str, Any]], axis: Any) -> None:
    """Metrics of tasks between 0 and 1, the first eight of them; perplexities are in metrics.jsonl."""
    names = dict.fromkeys(key for e in entries for key in e if key.startswith("eval/"))
    shares = [name for name in names if all(0 <= e[name] <= 1 for e in entries if name in e)]
    for name, colour in zip(shares, COLOURS, strict=False):
        label = name.removeprefix("eval/").replace("/", " ")
        _draw(panel, entries, axis, name, color=colour, label=label, **_HELD_OUT)
    panel.margins(y=0.15)
    _finish(panel, "tasks", legend=bool(shares), ncols=2)


def _draw_sparsity(figure: Any, panel: Any, entries: Sequence[Any], layers: Sequence[str], axis: Any) -> None:
    x = [axis(e) for e in entries]
    rows = [[e.get(layer, float("nan")) for e in entries] for layer in layers]
    # Each value's cell ends half way to its neighbours; the first and the last cell are symmetric.
    middles = [(a + b) / 2 for a, b in itertools.pairwise(x)]
    first, last = (2 * x[0] - middles[0], 2 * x[-1] - middles[-1]) if middles else (0.0, x[0])
    edges = [max(first, 0.0), *middles, last], [layer - 0.5 for layer in range(len(layers) + 1)]
    mesh = panel.pcolormesh(*edges, rows, cmap="viridis", vmin=0, vmax=1)
    panel.set_yticks(range(0, len(layers), -(-len(layers) // 4)))
    panel.set_ylabel("layer")
    panel.spines[["top", "right"]].set_visible(False)
    figure.colorbar(mesh, ax=panel, label="FFN zeros", pad=0.01, fraction=0.03, ticks=[0, 0.5, 1])
