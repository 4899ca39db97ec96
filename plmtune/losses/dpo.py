"""Direct preference optimization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from plmtune.losses.preference import Comparisons, PreferenceLoss, mean_per_token
from plmtune.ranges import STRENGTH, WEIGHT, Range, check
from plmtune.registry import register


@register("loss", "dpo")
class Dpo(PreferenceLoss):
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta h), with two terms that may be added.

    loss = -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h)
           - nll_weight log pi(chosen) / |chosen|

    Smoothing, known as conservative DPO, takes each label for wrong with the probability label_smoothing; the last
    term keeps the chosen answer likely (arXiv 2404.19733, equation 1).

    Args:
        beta: how closely the model is held to its reference.
        label_smoothing: share of labels that are taken to be wrong.
        nll_weight: of the chosen answer's mean negative log-likelihood a token.

    Raises:
        ValueError: if beta is not above 0, label_smoothing not in [0, 0.5), or nll_weight negative.
    """

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 0.0) -> None:
        check(STRENGTH, beta=beta)
        # At one half the two terms ask for the opposite with the same force.
        check(Range(least=0, below=0.5), label_smoothing=label_smoothing)
        check(WEIGHT, nll_weight=nll_weight)
        self.beta, self.label_smoothing, self.nll_weight = beta, label_smoothing, nll_weight

    def __call__(self, c: Comparisons) -> Tensor:
        margin = self.beta * c.logratio_margin
        loss = -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
        return loss - self.nll_weight * mean_per_token(c.chosen, c.chosen_tokens) if self.nll_weight else loss
