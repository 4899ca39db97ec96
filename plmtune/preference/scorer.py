"""From micro-batches of comparisons to the numbers that a preference loss compares, and to metrics of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.losses.log_probs import log_probs
from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, Comparisons, PreferenceLoss
from plmtune.models.reward import head_scores
from plmtune.preference.comparisons import ComparisonBatch
from plmtune.training.runtime import Runtime

# Kind of comparison -> prefix of its metrics.
_PREFIXES = {DIRECT: "", GIVEN_REJECTED: "given_rejected/", GIVEN_CHOSEN: "given_chosen/"}


def answer_scores(trained: nn.Module, model: Any, batch: ComparisonBatch, *, scalar_head: bool) -> Tensor:
    """The log-probability of each answer, or its score by a scalar head, [2n] in the order of `batch.lengths`.

    `trained` is the module that is called: `model` or a wrapper of it.
    """
    hidden = trained(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True).flatten(0, 1)  # [b s, d]
    if scalar_head:
        return head_scores(model, hidden, batch.ends)
    num = batch.lengths.numel()
    rows = hidden[batch.positions]
    return log_probs(rows, model.head_weight, batch.targets, batch.completion, num, **model.loss_settings)


def compare(batch: ComparisonBatch, scores: Tensor, reference: Tensor, kl: Tensor) -> Comparisons:
    """The inputs of a loss for a batch.

    Args:
        scores (Tensor): from `answer_scores`, [2n].
        reference (Tensor): the same under the reference for all comparisons of the data, [num, 2].
    """
    known = reference[batch.index]
    return Comparisons(
        chosen=scores[::2],
        rejected=scores[1::2],
        reference_chosen=known[:, 0],
        reference_rejected=known[:, 1],
        chosen_tokens=batch.lengths[::2],
        rejected_tokens=batch.lengths[1::2],
        kind=batch.kind,
        kl=kl,
    )


class AnswerScorer:
    """Scores answers under the policy, called as `trained`, or under a second model."""

    def __init__(self, model: nn.Module, trained: nn.Module, loss: PreferenceLoss, runtime: Runtime) -> None:
        self.model, self.trained, self.loss, self.runtime = model, trained, loss, runtime

    def __call__(self, batch: ComparisonBatch, second_model: nn.Module | None = None) -> Tensor:
        """`answer_scores` of a batch, [2n], in the run's precision."""
        batch = batch.to(self.runtime.device)
        dtype = self.runtime.compute_dtype
        # FSDP2 casts the policy by itself, but not a second model.
        casts = torch.autocast(batch.tokens.device.type, dtype, enabled=dtype != torch.float32)
        with casts if second_model else self.runtime.autocast():
            trained, model = second_model or self.trained, second_model or self.model
            return answer_scores(trained, model, batch, scalar_head=self.loss.scalar_head)

    def compare(self, batch: ComparisonBatch, reference: Tensor, kl: Tensor) -> Comparisons:
        """The inputs of the loss for a batch under the policy; arguments as for the function `compare`."""
        batch = batch.to(self.runtime.device)
        return compare(batch, self(batch), reference, kl)

    @torch.no_grad()
    def mean_kl(self, batches: Iterable[ComparisonBatch], reference: Tensor) -> Tensor:
        """KTO's KL term: the mean log-ratio of a step's mismatched answers over all ranks; 0 for other losses."""
        total, count = torch.zeros((), device=self.runtime.device), 0
        if not self.loss.mismatched:
            return total
        for batch in (batch for batch in batches if batch.kl_only):
            ratios = self(batch)[::2] - reference[batch.index, 0]
            total, count = total + ratios.sum(), count + len(ratios)
        ratio, number = self.runtime.sum(total, float(count))
        return torch.tensor(ratio / max(number, 1.0), device=self.runtime.device)


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
        """The means over all ranks; every rank must call it. `scores` of answers equal rewards, and are left out."""
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
