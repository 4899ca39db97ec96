"""Measure, layer by layer on real text, where decoding is faster if it skips the zeros of squared ReLU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SquaredReLU
from plmtune.modules.linear import Linear
from plmtune.quantization.calibrate import inputs_seen
from plmtune.training.determinism import measure_seconds

_ROWS = 8  # tokens whose products are timed
_LONGEST = 512  # tokens that the shares of zeros are counted over


@dataclass(frozen=True)
class LayerChoice:
    """What was measured of one layer's `down`, and what was chosen.

    Attributes:
        layer: its number.
        sparsity: share of `down`'s inputs that are zero.
        dense_us, sparse_us: microseconds of its product with one row, the median.
        on: zeros are skipped.
    """

    layer: int
    sparsity: float
    dense_us: float
    sparse_us: float
    on: bool


def squared_relus(model: Decoder) -> dict[int, SquaredReLU]:
    """By the number of their layer, the FFNs that can skip zeros: squared ReLU whose `down` holds no integers."""
    return {
        number: layer.ffn
        for number, layer in enumerate(model.layers)
        if isinstance(layer.ffn, SquaredReLU) and type(layer.ffn.down_proj) in (Linear, nn.Linear)
    }


def switch(model: Decoder, on: bool) -> None:
    """Switch skipping on or off in all layers that can skip zeros."""
    for ffn in squared_relus(model).values():
        ffn.sparse = on


@torch.no_grad()
def choose(model: Decoder, ids: Sequence[int] | Tensor, *, rounds: int = 5) -> list[LayerChoice]:
    """Switch `sparse` on in the layers where it is faster here, with as many threads as torch uses, and off elsewhere.

    Args:
        model: that decodes; changed in place.
        ids: some text's tokens, of which the first 512 are read.
        rounds: of the measurement; in each a product of all layers is timed with several tokens' inputs.
    """
    found = squared_relus(model)
    text = torch.as_tensor(ids, device=model.device).view(1, -1)[:, : min(_LONGEST, model.max_seq_len)]
    if text.shape[1] == 0:
        raise ValueError("without a text's tokens there are no zeros to be counted")
    shares: dict[int, float] = {}
    rows: dict[int, list[Tensor]] = {}  # inputs of `down`, each [1, 1, hidden_dim]

    def see(name: str, inputs: Tensor) -> None:
        number = int(name.split(".")[1])
        shares[number] = float((inputs == 0).float().mean())
        rows[number] = list(inputs[None, -_ROWS:].clone().split(1, dim=1))

    switch(model, False)  # or a text of one token would not reach the hooks
    with inputs_seen(model, [f"layers.{number}.ffn.down_proj" for number in found], see):
        model(text, hidden=True)
    # Each in the layout that it is decoded in.
    dense = _times({number: ffn.down_proj for number, ffn in found.items()}, rows, rounds)
    switch(model, True)
    sparse = _times({number: ffn.skip_zeros for number, ffn in found.items()}, rows, rounds)
    choices = []
    for number, ffn in found.items():
        before, after = dense[number], sparse[number]
        ffn.sparse = after < before
        choices.append(LayerChoice(number, shares[number], before * 1e6, after * 1e6, ffn.sparse))
    return choices


def _times(
    products: Mapping[int, Callable[[Tensor], Tensor]], rows: dict[int, list[Tensor]], rounds: int
) -> dict[int, float]:
    """Median seconds of each layer's product with one row."""
    taken: dict[int, list[float]] = {number: [] for number in products}
    for round in range(rounds + 1):
        for row in range(len(next(iter(rows.values()), []))):
            # Layer after layer, so that no product finds its weight in a cache where decoding would not.
            for number, product in products.items():
                x = rows[number][row]
                seconds = measure_seconds(partial(product, x), x.device)
                if round:  # the first warms up
                    taken[number].append(seconds)
    return {number: statistics.median(times) for number, times in taken.items()}
