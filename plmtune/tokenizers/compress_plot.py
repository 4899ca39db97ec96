"""A plot of the vocabulary's size against coverage and the share of embedding and head, the chosen size marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from plmtune.io.figures import finish, look, new_figure
from plmtune.tokenizers.compress import Order, embedding_share

# The rule of PanGu-pi Pro: more of the text than the first, less of the parameters than the second.
COVERAGE, SHARE = 0.9, 0.2
_POINTS = 200


def draw(order: Order, chosen: int, whole: int, model: tuple[int, int] | None, path: Path, title: str) -> None:
    """Draw both curves over the sizes from the least to the whole vocabulary.

    Args:
        chosen, whole: tokens that are kept, and that there are.
        model: parameters of a token's rows and of all else; None: there is no model, and one curve.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    sizes = np.unique(np.geomspace(order.least, whole, _POINTS).round().astype(int))
    curves = [("coverage of the text's tokens", order.coverage, COVERAGE)]
    if model is not None:
        curves.append(("embedding and head in all parameters", embedding_share(np.arange(whole + 1), *model), SHARE))
    labels = []
    for number, (name, values, rule) in enumerate(curves):
        style = look(number)
        axes.plot(sizes, 100 * values[np.minimum(sizes, len(values) - 1)], color=style["color"], label=name)
        axes.axhline(100 * rule, color=style["color"], linewidth=0.8, linestyle="--", alpha=0.6)
        value = float(100 * values[min(chosen, len(values) - 1)])
        axes.plot([chosen], [value], linestyle="None", markersize=8, **style)
        labels.append((f"{chosen:,}: {value:.1f}%", chosen, value))
    axes.set_xscale("log")
    axes.set_ylim(0, 103)
    axes.set_xlabel("tokens in the vocabulary")
    axes.set_ylabel("%")
    axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", fontsize=9, ncols=2)
    finish(figure, path, labels={axes: labels})
