"""A picture of sensitivities: size against perplexity of mixes, and the divergence of each module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plmtune.io.figures import COLOURS, finish, new_figure
from plmtune.quantization.mixes import Option, choose, kind_of, mixes, options_of
from plmtune.quantization.sensitivity import Sensitivities, layer_of
from plmtune.units import byte_unit, show_bytes

_FLOOR = 1e-7  # smaller divergences are drawn as this one
_MIXES, _PROPOSED, _MEASURED = COLOURS[:3]


class Measured(NamedTuple):
    """A whole model that was measured: bytes of its weights, and its loss in nats a token."""

    bytes: int
    loss: float


def draw(
    found: Sensitivities,
    path: Path,
    before: Measured,
    after: Measured,
    *,
    tokens: int,
    rules: Mapping[str, str] | None = None,
) -> None:
    """Draw size against perplexity, and the divergence of each module, as a PNG.

    The perplexity of a mix is predicted: that of `before`, times e to the sum of its modules' divergences.

    Args:
        before, after: the model before and after quantizing.
        tokens: predictions that these two were measured on.
        rules: the mix that was chosen.
    """
    from matplotlib.colors import LogNorm

    layers = 1 + max((layer_of(row.module) or 0 for row in found), default=0)
    kinds = list(dict.fromkeys(kind_of(row.module) for row in found))
    figure = new_figure(9, 5.6 + 0.3 * len(kinds))
    sizes, grid = figure.subplots(2, 1, height_ratios=[4.4, 1 + 0.3 * len(kinds)])
    names = _draw_sizes(sizes, found, before, after, tokens, rules)

    table = [[math.nan] * layers for _ in kinds]
    for row in found:
        table[kinds.index(kind_of(row.module))][layer_of(row.module) or 0] = max(row.divergence, _FLOOR)
    mesh = grid.imshow(table, aspect="auto", cmap="viridis", norm=LogNorm(), interpolation="nearest")
    grid.set_yticks(range(len(kinds)), [kind.removeprefix("layers.*.") for kind in kinds], fontsize=8)
    grid.set_xticks(range(0, layers, -(-layers // 16)))
    grid.set_xlabel("layer (embedding and head: at the left)")
    grid.set_title(f"divergence of each module quantized alone, on {found.tokens:,} tokens", fontsize=10)
    figure.colorbar(mesh, ax=grid, label="nats a token", pad=0.01, fraction=0.03)
    for panel in (sizes, grid):
        panel.spines[["top", "right"]].set_visible(False)
    finish(figure, path, labels={sizes: names})


def _draw_sizes(
    panel: Any, found: Sensitivities, before: Measured, after: Measured, tokens: int, rules: Mapping[str, str] | None
) -> list[tuple[str, float, float]]:
    """Draw bytes against perplexity of mixes, uniform formats and both measured models; return the points' names."""
    options = options_of(found)
    fixed = before.bytes - sum(row.kept_bytes for row in found)
    size, unit = byte_unit(before.bytes)

    def point(chosen: Mapping[str, Option]) -> tuple[float, float]:
        nats = before.loss + sum(option.divergence for option in chosen.values())
        return (fixed + sum(option.bytes for option in chosen.values())) / size, math.exp(nats)

    line = [point(chosen) for chosen in mixes(options)]
    panel.plot(*zip(*line, strict=True), color=_MIXES, linewidth=1.5, label="best mixes, predicted")
    uniform = {
        "all as planned": {row.module: Option(row.bytes, row.divergence, row.format) for row in found},
        "all in 8 bits": {row.module: Option(row.wide_bytes, row.wide_divergence, row.wide_format) for row in found},
    }
    names = []
    for label, model in {"before": before, "after": after}.items():
        x, y = model.bytes / size, math.exp(model.loss)
        panel.plot(x, y, color=_MEASURED, marker="X", markersize=8, linestyle="none")
        names.append((f"{label}: {show_bytes(model.bytes, before.bytes)}, perplexity {y:.2f}", x, y))
    for label, chosen in uniform.items():
        x, y = point(chosen)
        panel.plot(x, y, color=_MIXES, marker="o", markersize=5, linestyle="none")
        names.append((label, x, y))
    if rules is not None:
        x, y = point(choose(options, rules))
        panel.plot(x, y, color=_PROPOSED, marker="*", markersize=13, linestyle="none", label="the mix, predicted")
    panel.plot([], [], color=_MIXES, marker="o", markersize=5, linestyle="none", label="one format, predicted")
    panel.plot([], [], color=_MEASURED, marker="X", markersize=8, linestyle="none", label="measured")
    panel.set_xlabel(f"weights, {unit}")
    panel.set_ylabel(f"perplexity on {tokens:,} tokens")
    panel.margins(x=0.1, y=0.15)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return names
