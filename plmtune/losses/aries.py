"""ARIES: preference and refinement in one loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, Comparisons, PreferenceLoss
from plmtune.ranges import STRENGTH, Range, check
from plmtune.registry import register


@register("loss", "aries")
class Aries(PreferenceLoss):
    """ARIES (arXiv 2502.05605): (1 - alpha) L_DPO + alpha L_ref, each comparison to the loss of its kind.

    L_DPO = -log sigmoid(beta_dpo h)                                        the answers to the prompt
    L_ref = (1/2 - beta_ref h_rejected)^2 + (1/2 - beta_ref h_chosen)^2     given an earlier answer to refine

    h_rejected and h_chosen compare the same two answers to the refinement template filled with the rejected and with
    the chosen one; both want the chosen answer. (1/2 - beta h)^2 = beta^2 (h - 1 / (2 beta))^2: beta^2 times IPO over
    summed log-probabilities. At the reference L_DPO is log 2 and L_ref is 1/2.

    Args:
        alpha: share of refinement.
        beta_dpo: of the direct term.
        beta_ref: of the refinement term; 0.01 and 0.025 are in use in the codes of its line (SRPO, Sherlock).

    Raises:
        ValueError: if alpha is not in [0, 1], or a beta not above 0.
    """

    contexts = True

    def __init__(self, *, alpha: float = 0.8, beta_dpo: float = 0.1, beta_ref: float = 0.01) -> None:
        check(Range(least=0, most=1), alpha=alpha)
        check(STRENGTH, beta_dpo=beta_dpo, beta_ref=beta_ref)
        self.alpha, self.beta_dpo, self.beta_ref = alpha, beta_dpo, beta_ref

    def __call__(self, c: Comparisons) -> Tensor:
        direct = -(1 - self.alpha) * F.logsigmoid(self.beta_dpo * c.logratio_margin)
        refined = self.alpha * (0.5 - self.beta_ref * c.logratio_margin).square()
        given = (c.kind == GIVEN_REJECTED) | (c.kind == GIVEN_CHOSEN)
        return direct.where(c.kind == DIRECT, refined.where(given, 0))

    def rewards(self, c: Comparisons) -> tuple[Tensor, Tensor]:
        """The log-ratios times the beta of their term."""
        beta = c.logratio_margin.new_full((), self.beta_dpo).where(c.kind == DIRECT, self.beta_ref)
        return beta * c.chosen_ratio.detach(), beta * c.rejected_ratio.detach()
