"""The loss of a reward model: scores that order answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from plmtune.losses.preference import Comparisons, PreferenceLoss
from plmtune.ranges import WEIGHT, check
from plmtune.registry import register


@register("loss", "bradley_terry")
class BradleyTerry(PreferenceLoss):
    """-log sigmoid(score(chosen) - score(rejected) - margin) (arXiv 2203.02155, equation 1).

    Trains the scalar head of a reward model and the layers below it; there is no reference.

    Args:
        margin: by which the chosen answer's score must exceed the other's (arXiv 2307.09288, equation 2).

    Raises:
        ValueError: if margin is negative.
    """

    needs_reference = False
    scalar_head = True

    def __init__(self, *, margin: float = 0.0) -> None:
        check(WEIGHT, margin=margin)
        self.margin = margin

    def __call__(self, c: Comparisons) -> Tensor:
        return -F.logsigmoid(c.chosen - c.rejected - self.margin)

    def rewards(self, c: Comparisons) -> tuple[Tensor, Tensor]:
        return c.chosen.detach(), c.rejected.detach()
