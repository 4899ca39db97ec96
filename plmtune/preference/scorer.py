"""From micro-batches of comparisons to the numbers that a preference loss compares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.losses.log_probs import log_probs
from plmtune.losses.preference import Comparisons, PreferenceLoss
from plmtune.models.reward import head_scores
from plmtune.preference.comparison_batch import ComparisonBatch
from plmtune.training.runtime import Runtime


def answer_scores(trained: nn.Module, model: Any, batch: ComparisonBatch, *, scalar_head: bool) -> Tensor:
    """The log-probability of each answer, or its score by a scalar head, [2n] in the order of `batch.lengths`.

    Args:
        trained: the module that is called: `model` or a wrapper of it.
    """
    hidden = trained(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True).flatten(0, 1)  # [b s, d]
    if scalar_head:
        return head_scores(model, hidden, batch.ends)
    num = batch.lengths.numel()
    return log_probs(hidden[batch.positions], model.head_weight, batch.targets, batch.completion, num)


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
    """Scores answers under the policy, or under a second model.

    Args:
        model: the policy.
        trained: the module that is called: `model` or a wrapper of it.
        loss: decides between log-probabilities and scores of a scalar head.
    """

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
        if not self.loss.mismatched:
            return torch.zeros((), device=self.runtime.device)
        total, count = torch.zeros((), device=self.runtime.device), 0
        for batch in (batch for batch in batches if batch.kl_only):
            ratios = self(batch)[::2] - reference[batch.index, 0]
            total, count = total + ratios.sum(), count + len(ratios)
        ratio, number = self.runtime.sum(total, float(count))
        return torch.tensor(ratio / max(number, 1.0), device=self.runtime.device)
