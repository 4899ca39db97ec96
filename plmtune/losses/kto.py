"""Kahneman-Tversky optimization: answers that are good or bad by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from plmtune.losses.preference import MISMATCHED, Comparisons, PreferenceLoss
from plmtune.ranges import STRENGTH, WEIGHT, check
from plmtune.registry import register


@register("loss", "kto")
class Kto(PreferenceLoss):
    """KTO (arXiv 2402.01306, equation 8): each answer against a kl z, not against the other one.

    loss = desirable_weight (1 - sigmoid(beta (log-ratio of chosen - z)))
         + undesirable_weight (1 - sigmoid(beta (z - log-ratio of rejected)))

    z = max(0, mean log-ratio of prompts with another prompt's answer) estimates the divergence from the reference
    and carries no gradient. An answer that is not there counts nothing, so rows with one answer will do; of a row with
    both, both terms are added.

    Args:
        beta: how closely the model is held to its reference.
        desirable_weight: of chosen answers; the paper wants weight x number of them within 1 and 4/3 of the others'.
        undesirable_weight: of rejected answers.

    Raises:
        ValueError: if beta is not above 0, or a weight negative, or both 0.
    """

    mismatched = True

    def __init__(self, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        check(STRENGTH, beta=beta)
        check(WEIGHT, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        if desirable_weight == undesirable_weight == 0:
            given = f"desirable_weight ({desirable_weight}) and undesirable_weight ({undesirable_weight})"
            raise ValueError(f"{given} must not both be 0")
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight

    def __call__(self, c: Comparisons) -> Tensor:
        z = c.kl.detach().clamp(min=0)
        # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where x is large.
        good = self.desirable_weight * torch.sigmoid(-self.beta * (c.chosen_ratio - z))
        bad = self.undesirable_weight * torch.sigmoid(-self.beta * (z - c.rejected_ratio))
        loss = good.where(c.chosen_tokens > 0, 0) + bad.where(c.rejected_tokens > 0, 0)
        return loss.where(c.kind != MISMATCHED, 0)
