"""The effective dimension of a model's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plmtune.modules.attributes import with_attributes
from plmtune.training import distributed

SHARE = 0.8


class EffectiveDimension:
    """How many principal components of a layer's output hold 80% of its variance (PanGu-pi, arXiv 2312.17276, section
    5.2), for each layer:

        d(0.8) = the smallest k with  l_1 + ... + l_k >= 0.8 (l_1 + ... + l_d),

    l_1 >= l_2 >= ... the eigenvalues of the covariance of the tokens' hidden states. The tokens of a validation are
    summed up in fp64, with a d x d matrix for each layer (8 layers d^2 bytes; 0.8 GB for 24 layers of 2,048). The first
    token of a row is left out: its hidden states are outliers, which the paper removes in its pictures, too.

    Args:
        model: a `Decoder`.
        wanted: False: nothing is measured.
    """

    def __init__(self, model: Any, *, wanted: bool = True) -> None:
        self._model, self._wanted = model, wanted
        self._kept: Tensor | None = None
        if wanted:
            layers, width = len(model.layers), model.embed_dim
            # [layers, d + 1, d]: the products of all pairs of numbers, and in the last row the sums.
            self._sums = torch.zeros(layers, width + 1, width, dtype=torch.float64, device=model.device)
            self._count = torch.zeros((), dtype=torch.float64, device=model.device)

    @contextmanager
    def of(self, counted: Tensor) -> Iterator[None]:
        """Inside the context, measure the forward of a batch whose counted (Tensor), boolean, [b, s], tokens count."""
        if not self._wanted:
            yield
            return
        kept = counted.clone()
        kept[:, 0] = False
        self._count += kept.sum()

        def observe(layer: int, hidden: Tensor) -> None:
            x = hidden[kept].double()  # [n, d]
            self._sums[layer, :-1].addmm_(x.T, x)
            self._sums[layer, -1] += x.sum(0)

        observer: Callable[[int, Tensor], None] = observe
        with with_attributes([self._model], observe=observer):
            yield

    def metrics(self) -> dict[str, float]:
        """effective_dimension/0, effective_dimension/1, ... over all ranks, each of which must call it."""
        if not self._wanted:
            return {}
        count = float(distributed.reduce_sum(self._count))
        if count < 2:
            return {}
        means = distributed.reduce_sum(self._sums) / count
        found = {}
        for layer, both in enumerate(means):
            squares, mean = both[:-1].cpu(), both[-1].cpu()
            variances = torch.linalg.eigvalsh(squares - torch.outer(mean, mean)).clamp(min=0).flip(0).cumsum(0)
            found[f"effective_dimension/{layer}"] = float((variances < SHARE * variances[-1]).sum() + 1)
        return found
