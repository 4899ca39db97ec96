"""The inputs of preference losses, and their interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

# Kinds of comparisons, see `plmtune.preference.comparisons.Comparison`.
DIRECT, GIVEN_REJECTED, GIVEN_CHOSEN, MISMATCHED = range(4)


@dataclass(frozen=True)
class Comparisons:
    """n comparisons of two answers to one prompt, as a model and its reference see them.

    Args:
        chosen, rejected (Tensor): summed log-probabilities of the answers, or their scores for a loss with
            `scalar_head`, [n], with gradient.
        reference_chosen, reference_rejected (Tensor): the same under the reference, [n]; read by losses with
            `needs_reference` alone.
        chosen_tokens, rejected_tokens (Tensor): lengths, [n]; 0 where there is no such answer.
        kind (Tensor): DIRECT, GIVEN_REJECTED, GIVEN_CHOSEN or MISMATCHED, [n].
        kl (Tensor): mean log-ratio of the chosen answers of the whole step's MISMATCHED comparisons, a
            scalar; read by losses with `mismatched` alone.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    kind: Tensor
    kl: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi(chosen) - log ref(chosen), [n]."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi(rejected) - log ref(rejected), [n]."""
        return self.rejected - self.reference_rejected

    @property
    def logratio_margin(self) -> Tensor:
        """How much more than its reference the model prefers the chosen answer: a difference of log-ratios, [n]."""
        return self.chosen_ratio - self.rejected_ratio


class PreferenceLoss(ABC):
    """A loss over comparisons; its attributes declare the data that it needs.

    Attributes:
        data_kind: what it is a loss over: "tokens" (any loss that does not say), "refinements" or "comparisons".
        needs_reference: it reads the reference's log-probabilities.
        contexts: it needs the comparisons given the rejected and the chosen answer too (ARIES).
        mismatched: it needs the prompts with another prompt's answer too (KTO's kl), and takes rows with one
            answer.
        scalar_head: it compares scores of one number a sequence instead of log-probabilities.
    """

    data_kind: ClassVar[str] = "comparisons"
    needs_reference: ClassVar[bool] = True
    contexts: ClassVar[bool] = False
    mismatched: ClassVar[bool] = False
    scalar_head: ClassVar[bool] = False
    beta: float

    @abstractmethod
    def __call__(self, c: Comparisons) -> Tensor:
        """Each comparison's loss, [n]; their sum over a step is divided by its number of pairs."""

    def rewards(self, c: Comparisons) -> tuple[Tensor, Tensor]:
        """The implicit rewards of the chosen and of the rejected answers, [n] each: beta times the log-ratios."""
        return self.beta * c.chosen_ratio.detach(), self.beta * c.rejected_ratio.detach()


def mean_per_token(sums: Tensor, tokens: Tensor) -> Tensor:
    """sums / tokens, [n]; 0 for an answer without tokens, whose sum is 0."""
    return sums / tokens.clamp(min=1)
