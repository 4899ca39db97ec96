"""Importance of layers: the loss without some adjacent ones, or the cosine distance of a layer's input and output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plmtune.models.text_loss import CHUNK, log_probs, sum_of
from plmtune.modules.decoder import Decoder

Run = tuple[int, int]  # the first of some adjacent layers, and how many


@torch.no_grad()
def rises_without(
    model: Decoder,
    batches: Sequence[Tensor],
    longest: int,
    *,
    found: dict[Run, float] | None = None,
    progress: Callable[[Sequence[Run]], Iterable[Run]] = iter,
) -> dict[Run, float]:
    """The rise of the loss, nats a token, when adjacent layers are skipped (PanGu-pi Pro, arXiv 2402.02791).

    Args:
        batches: ids, [b, s], on the model's device; a few thousand tokens suffice.
        longest: most layers that are skipped together.
        found: what was measured before, which is not measured again; the others are added.
        progress: wraps the iteration over the runs of layers.
    """
    count = len(model.layers)
    found = {} if found is None else found
    removable = count if model.query_embeddings is None else count - 1  # the query layer stays
    runs = [(first, n) for n in range(1, min(longest, removable) + 1) for first in range(removable - n + 1)]
    runs = [run for run in runs if run not in found]
    inputs = [_inputs(model, ids) for ids in batches]
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    base = sum(_nats(model, held[-1], count, ids) for held, ids in zip(inputs, batches, strict=True))
    for first, n in progress(runs):
        nats = sum(_nats(model, held[first], first + n, ids) for held, ids in zip(inputs, batches, strict=True))
        found[first, n] = (nats - base) / tokens
    return found


@torch.no_grad()
def block_influence(model: Decoder, batches: Iterable[Tensor]) -> list[float]:
    """1 - mean cos of each layer's input and output over tokens (ShortGPT, arXiv 2403.03853, eq. 1)."""
    sums, tokens = torch.zeros(len(model.layers), dtype=torch.float64), 0
    for ids in batches:
        held = _inputs(model, ids)
        for index, (x, y) in enumerate(pairwise(held)):
            sums[index] += F.cosine_similarity(x.float(), y.float(), dim=-1).double().sum().cpu()
        tokens += ids.numel()
    return [float(value) for value in 1 - sums / tokens]


def layers_by_rises(rises: Mapping[Run, float], num_layers: int, keep: int) -> tuple[int, ...]:
    """The layers that stay, where the runs that go have the least sum of rises. A layer that is in no run stays.

    Two runs touch only where fewer layers would go otherwise: what they lose together is measured for no such pair.
    """
    longest = max(n for _, n in rises)
    for touching in (False, True):
        # Layers passed, layers dropped, whether the last one was -> (sum of rises, layers that stay).
        best: dict[tuple[int, int, bool], tuple[float, tuple[int, ...]]] = {(0, 0, False): (0.0, ())}
        for at in range(num_layers):
            for dropped in range(at + 1):
                for last in (False, True):
                    if (at, dropped, last) not in best:
                        continue
                    cost, kept = best[at, dropped, last]
                    options = [((at + 1, dropped, False), (cost, (*kept, at)))]
                    if touching or not last:
                        options += [
                            ((at + n, dropped + n, True), (cost + rises[at, n], kept))
                            for n in range(1, min(longest, num_layers - at) + 1)
                            if (at, n) in rises
                        ]
                    for state, found in options:
                        if state not in best or found < best[state]:
                            best[state] = found
        ends = [best[end] for last in (False, True) if (end := (num_layers, num_layers - keep, last)) in best]
        if ends:
            return min(ends)[1]
    raise AssertionError("every number of layers can go where runs touch")


def layers_by_importance(values: Sequence[float], keep: int) -> tuple[int, ...]:
    """The most important layers; of equal ones the earlier."""
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    return tuple(sorted(order[:keep]))


def _inputs(model: Decoder, ids: Tensor) -> list[Tensor]:
    """The input of each layer, and the output of the last, [b, s, d] each."""
    held: list[Any] = [None] * (len(model.layers) + 1)

    def before(index: int, _: Any, arguments: tuple[Tensor, ...]) -> None:
        held[index] = arguments[0]

    def after(_: Any, __: Any, output: Tensor) -> None:
        held[-1] = output

    with ExitStack() as stack:
        for index, layer in enumerate(model.layers):
            stack.callback(layer.register_forward_pre_hook(partial(before, index)).remove)
        stack.callback(model.layers[-1].register_forward_hook(after).remove)
        model(ids, hidden=True)
    return held


def _nats(model: Decoder, x: Tensor, first: int, ids: Tensor) -> float:
    """The sum of the loss over tokens, from x (Tensor), the input of layer `first`."""
    for index in range(first, len(model.layers)):
        x = model.layers[index](x, **model.of_tokens(index, ids))
    parts = zip(log_probs(model, model.finish(x)), ids[:, 1:].flatten().split(CHUNK), strict=True)
    return -sum(sum_of(part, expected) for part, expected in parts)
