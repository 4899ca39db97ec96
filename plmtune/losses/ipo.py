"""Identity preference optimization."""

from __future__ import annotations

from torch import Tensor

from plmtune.losses.preference import Comparisons, PreferenceLoss, mean_per_token
from plmtune.ranges import STRENGTH, check
from plmtune.registry import register


@register("loss", "ipo")
class Ipo(PreferenceLoss):
    """IPO (arXiv 2310.12036, equation 17): (h - 1 / (2 beta))^2, with the paper's tau as beta.

    Args:
        beta: how closely the model is held to its reference.
        average: take log-ratios as means over an answer's tokens, as the paper's authors did in their runs (so
            TRL's documentation says), so that beta means the same for short and long answers. With sums it is
            1 / beta^2 times one of ARIES's squares.

    Raises:
        ValueError: if beta is not above 0.
    """

    def __init__(self, *, beta: float = 0.1, average: bool = True) -> None:
        check(STRENGTH, beta=beta)
        self.beta, self.average = beta, average

    def _ratios(self, c: Comparisons) -> tuple[Tensor, Tensor]:
        if not self.average:
            return c.chosen_ratio, c.rejected_ratio
        return mean_per_token(c.chosen_ratio, c.chosen_tokens), mean_per_token(c.rejected_ratio, c.rejected_tokens)

    def __call__(self, c: Comparisons) -> Tensor:
        chosen, rejected = self._ratios(c)
        return (chosen - rejected - 1 / (2 * self.beta)).square()

    def rewards(self, c: Comparisons) -> tuple[Tensor, Tensor]:
        """beta times the log-ratios that the loss compares."""
        chosen, rejected = self._ratios(c)
        return self.beta * chosen.detach(), self.beta * rejected.detach()
