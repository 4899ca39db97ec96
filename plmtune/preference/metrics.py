"""Metrics of preference training: accuracy, margins, rewards and log-probabilities by kind of comparison."""

from __future__ import annotations

import torch

from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, Comparisons, PreferenceLoss
from plmtune.training.runtime import Runtime

# Kind of comparison -> prefix of its metrics.
_PREFIXES = {DIRECT: "", GIVEN_REJECTED: "given_rejected/", GIVEN_CHOSEN: "given_chosen/"}


class PreferenceMetrics:
    """Means over comparisons, separate for each kind.

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
            of_kind = c.kind == kind
            self._sums[row] += torch.cat([torch.stack(values, dim=1)[has & of_kind].sum(0) for has, values in parts])

    def means(self, runtime: Runtime, *, scores: bool = False) -> dict[str, float]:
        """The means over all ranks; every rank must call it.

        Args:
            scores: answers have scores instead of log-probabilities, and these equal the rewards.
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
