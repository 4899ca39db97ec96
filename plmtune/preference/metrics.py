"""From a batch of comparisons to what a preference loss sees, and to what a person wants to know of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plmtune.losses.log_probs import log_probs
from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, PreferenceLoss
from plmtune.losses.preference import Comparisons as Comparisons
from plmtune.models.reward import head_scores
from plmtune.preference.comparison_batch import ComparisonBatch
from plmtune.training.runtime import Runtime

# What a comparison was given, and how its numbers are named.
_PREFIXES = {DIRECT: "", GIVEN_REJECTED: "given_rejected/", GIVEN_CHOSEN: "given_chosen/"}


def answers(trained: nn.Module, model: Any, batch: ComparisonBatch, *, scores: bool) -> Tensor:
    """The log-probability of each answer, or with `scores` its score, [2n] in the order of `batch.lengths`.

    Args:
        trained: what is called, perhaps a wrapper of `model`.
    """
    hidden = trained(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True).flatten(0, 1)  # [b s, d]
    if scores:
        return head_scores(model, hidden, batch.ends)
    num = batch.lengths.numel()
    return log_probs(hidden[batch.positions], model.head_weight, batch.targets, batch.completion, num)


def comparisons(batch: ComparisonBatch, found: Tensor, reference: Tensor, kl: Tensor) -> Comparisons:
    """What a loss sees of a batch.

    Args:
        found (Tensor): what `answers` gave, [2n].
        reference (Tensor): the same under the reference for all comparisons of the data, [num, 2].
    """
    known = reference[batch.index]
    return Comparisons(
        chosen=found[::2],
        rejected=found[1::2],
        reference_chosen=known[:, 0],
        reference_rejected=known[:, 1],
        chosen_tokens=batch.lengths[::2],
        rejected_tokens=batch.lengths[1::2],
        kind=batch.kind,
        kl=kl,
    )


class PreferenceMetrics:
    """Means over comparisons, for each of what they were given apart: what a person reads of preference training.

    logratio_margin, accuracy and margin count comparisons with both answers; rewards and log-probabilities count every
    answer.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_PREFIXES), 10, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, c: Comparisons, loss: PreferenceLoss) -> None:
        """Count a batch."""
        chosen, rejected = loss.rewards(c)
        has_chosen, has_rejected = c.chosen_tokens > 0, c.rejected_tokens > 0
        margin = chosen - rejected
        one = torch.ones_like(margin)
        parts = (
            (has_chosen & has_rejected, (one, c.logratio_margin, (margin > 0).to(margin.dtype), margin)),
            (has_chosen, (one, chosen, c.chosen)),
            (has_rejected, (one, rejected, c.rejected)),
        )
        for row, kind in enumerate(_PREFIXES):
            here = c.kind == kind
            self._sums[row] += torch.cat([torch.stack(of, dim=1)[there & here].sum(0) for there, of in parts])

    def means(self, runtime: Runtime, *, scores: bool = False) -> dict[str, float]:
        """Over all ranks, which all must call it.

        Args:
            scores: answers have scores, not log-probabilities: those of the rewards say it all.
        """
        sums = runtime.sum(*self._sums.flatten())
        found: dict[str, float] = {}
        for row, prefix in enumerate(_PREFIXES.values()):
            both, logratio_margin, accuracy, margin, *answers = sums[10 * row : 10 * row + 10]
            if both:
                found |= {
                    f"{prefix}logratio_margin": logratio_margin / both,
                    f"{prefix}accuracy": accuracy / both,
                    f"{prefix}margin": margin / both,
                }
            for side, (count, reward, log_prob) in (("chosen", answers[:3]), ("rejected", answers[3:])):
                if count:
                    found[f"{prefix}rewards/{side}"] = reward / count
                    if not scores:
                        found[f"{prefix}log_probs/{side}"] = log_prob / count
        return found
