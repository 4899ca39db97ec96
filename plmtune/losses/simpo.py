"""Simple preference optimization, without a reference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from plmtune.losses.preference import Comparisons, PreferenceLoss, mean_per_token
from plmtune.ranges import STRENGTH, WEIGHT, check
from plmtune.registry import register


@register("loss", "simpo")
class Simpo(PreferenceLoss):
    """SimPO (arXiv 2405.14734, equation 6): -log sigmoid(beta (log pi(w) / |w| - log pi(l) / |l|) - gamma).

    Args:
        beta: of the mean log-probabilities a token. 2.0 and a gamma of 1.0 are among the pairs that the paper's
            search ended with.
        gamma: target margin of the chosen answer.

    Raises:
        ValueError: if beta is not above 0, or gamma negative.
    """

    needs_reference = False

    def __init__(self, *, beta: float = 2.0, gamma: float = 1.0) -> None:
        check(STRENGTH, beta=beta)
        check(WEIGHT, gamma=gamma)
        self.beta, self.gamma = beta, gamma

    def _rewards(self, c: Comparisons) -> tuple[Tensor, Tensor]:
        chosen, rejected = mean_per_token(c.chosen, c.chosen_tokens), mean_per_token(c.rejected, c.rejected_tokens)
        return self.beta * chosen, self.beta * rejected

    def __call__(self, c: Comparisons) -> Tensor:
        chosen, rejected = self._rewards(c)
        return -F.logsigmoid(chosen - rejected - self.gamma)

    def rewards(self, c: Comparisons) -> tuple[Tensor, Tensor]:
        """beta times the mean log-probability a token (equation 4)."""
        chosen, rejected = self._rewards(c)
        return chosen.detach(), rejected.detach()
