"""Rounds of training: later ones draw a share of the first one's sequences again, by their losses (PanGu-pi Pro).

Section 4 of arXiv 2402.02791: after a round the loss of each sequence under the frozen model says how likely the next
round draws it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from plmtune.data.order import Ints, Phase, key_of, mix64, permute


def later_rounds(rounds: int, keep: float, steps: int) -> list[Phase]:
    """Return the phases of rounds 2 and above, each of a share `keep` of round 1's steps, rounded up.

    Raises:
        ValueError: if that share is less than a step.
    """
    if rounds > 1 and keep * steps < 1:
        raise ValueError(
            f"keep ({keep:g}) of round 1's {steps:,} step{'s' * (steps != 1)} is less than one global batch, so that a "
            f"later round has nothing to train on: give keep={math.ceil(1e4 / steps) / 1e4:g} or more, or longer phases"
        )
    share = math.ceil(keep * steps - 1e-9)
    return [Phase(f"round {number}", share, round=number) for number in range(2, rounds + 1)]


def gumbel(index: Ints, key: int) -> NDArray[np.float64]:
    """Return a number of the standard Gumbel distribution for each index, a pure function of index and key."""
    bits = mix64(mix64(index.astype(np.uint64)) ^ np.uint64(key)) >> np.uint64(11)
    return -np.log(-np.log((bits.astype(np.float64) + 0.5) / 2**53))


def draw(
    windows: Ints, count: int, *, key: int, losses: NDArray[np.floating] | None = None, temperature: float = 1.0
) -> Ints:
    """Draw `count` of a source's windows without replacement, and return them in a random order.

    One is drawn after the other with p = softmax(loss / temperature) over those that are left. The `count` highest of
    loss / temperature + Gumbel noise have this distribution (Gumbel top-k, arXiv 1903.06059). Where `count` exceeds
    the windows, as round 1 sampled some repeatedly, each is taken equally often, and only the rest is drawn.

    Args:
        windows: ascending, each once.
        losses: of the windows; None: all are equally likely.
    """
    passes, rest = divmod(count, max(len(windows), 1))
    scores = gumbel(windows, key)
    if losses is not None:
        scores += losses.astype(np.float64) / temperature
    taken = [windows] * passes + [windows[np.sort(np.argsort(-scores, kind="stable")[:rest])]]
    shuffled = [
        each[permute(np.arange(len(each)), len(each), key_of(key, "order", number))]
        for number, each in enumerate(taken)
        if len(each)
    ]
    return np.concatenate([*shuffled, windows[:0]])
