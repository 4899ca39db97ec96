"""The reference of preference training: the fixed model with which the policy is compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.models.digest import model_digest
from plmtune.modules.decoder import Decoder
from plmtune.preference.batches import PreferenceBatches
from plmtune.preference.comparison_batch import ComparisonBatch
from plmtune.preference.reference import reference_log_probs
from plmtune.preference.scorer import AnswerScorer
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.finetune_model import FinetuneModel
from plmtune.training.monitor import RunMonitor


class ReferenceModel:
    """Computes the reference's log-probabilities at the start of a stage, which trains on all pairs or on a round's.

    The reference is the model that the run began with, or with ``which="previous"`` the policy at the start of each
    round. Its weights come from the policy before the stage's first step, from the policy without its adapters, from a
    checkpoint of the run, or from `init_from`.

    Args:
        policy: the model under training.
        which: the config's `reference`.
        score: scores answers.
        load_first: loads a second model with the run's initial weights.
        checkpoints: of the run.
        run: its directory, for messages.
        digest: `model_digest` of this stage's reference, as the checkpoint has it; empty for a new run.
        first_digest: that of the weights that the run began with.
    """

    def __init__(
        self,
        policy: FinetuneModel,
        which: Literal["previous", "first"],
        score: AnswerScorer,
        load_first: Callable[[], Decoder],
        checkpoints: Checkpoints,
        run: Path,
        *,
        digest: str = "",
        first_digest: str = "",
    ) -> None:
        self.policy, self.which, self.score = policy, which, score
        self.load_first, self.checkpoints, self.run = load_first, checkpoints, run
        self.digest, self.first_digest = digest, first_digest

    def is_first(self, round_number: int) -> bool:
        """Whether the reference of a round is the model that the run began with; 0 is a run without rounds."""
        return round_number <= 1 or self.which == "first"

    def is_policy(self, round_number: int) -> bool:
        """Whether the policy at the start of a round is its reference."""
        return round_number <= 1 or self.which == "previous"

    def log_probs(
        self, data: PreferenceBatches, round_number: int, *, first_step: int, step: int, cache: str, monitor: RunMonitor
    ) -> Tensor:
        """Return the log-probabilities of every answer of a stage, [comparisons, 2], computed or read from the cache.

        They are zeros for a loss without a reference, and where the stage has no step left. Every rank must call it.

        Args:
            round_number: of the stage; 0 is a run without rounds.
            first_step: step of the run at which the stage begins.
            step: the step that the policy is at.
            cache: directory that keeps the numbers.

        Raises:
            UserError: if the weights no longer exist.
        """
        device, untrained = self.score.runtime.device, step == first_step
        zeros = torch.zeros(len(data.comparisons), 2, device=device)
        if not self.score.loss.needs_reference:
            return zeros
        # Keep the weights of a later round's reference: the cache may lose its numbers.
        self.checkpoints.pinned = None if self.is_first(round_number) else first_step
        if step == first_step + data.num_steps:
            return zeros
        found = self._compute(data, round_number, first_step, untrained, cache, monitor).to(device)
        if untrained and self.is_policy(round_number):
            difference = self._difference(data.step(0)[0], found)
            monitor.message(f"reference: log-probabilities of the first step differ by at most {difference:.2g}")
        return found

    @torch.no_grad()
    def _difference(self, batch: ComparisonBatch, reference: Tensor) -> float:
        """The largest difference of a batch's log-probabilities under the policy from those of the reference."""
        with self.policy.fake_quant_disabled():
            found = self.score(batch)
        difference = (found.view(-1, 2) - reference[batch.index.to(reference.device)]).abs()
        return float(difference.max()) if difference.numel() else 0.0

    def _compute(
        self,
        data: PreferenceBatches,
        round_number: int,
        first_step: int,
        untrained: bool,
        cache: str,
        monitor: RunMonitor,
    ) -> Tensor:
        policy, is_first = self.policy, self.is_first(round_number)
        if untrained:
            if is_first and (round_number <= 1 or policy.adapter_config):
                self.first_digest = model_digest(policy.model, without=policy.adapter_names)
            self.digest = self.first_digest if is_first else model_digest(policy.model)
        second: list[Decoder] = []  # loaded only if it is needed
        done, restored = 0, untrained or is_first

        @torch.no_grad()
        def compute(batch: ComparisonBatch) -> Tensor:
            nonlocal done, restored
            if not restored:  # every rank does it at its first batch, which may be empty
                self._restore_policy(round_number, first_step)
                restored = True
            done += len(batch.index)
            monitor.working(f"reference: log-probabilities of {done:,} comparisons")
            with policy.fake_quant_disabled():
                if is_first and policy.adapter_config:
                    with policy.adapters_disabled():
                        return self.score(batch)
                if not is_first or (untrained and round_number <= 1):
                    return self.score(batch)
                second[:] = second or [self._first()]
                return self.score(batch, second[0])

        policy.model.eval()
        found = reference_log_probs(
            self.digest,
            data.all,
            compute,
            cache,
            len(data.comparisons),
            arithmetic=f"{self.score.runtime.device.type} {self.score.runtime.compute_dtype}",
            log=monitor.message,
        )
        policy.model.train()
        if done and not untrained:
            monitor.message(
                f"reference: {cache} has no log-probabilities for this resume (in bf16 they depend on micro_batch_size "
                f"and the number of processes); computed again {'from init_from' if second else 'from kept weights'}"
            )
        how = "computed, and kept in" if done else "read from"
        monitor.message(f"reference: log-probabilities {how} {cache}")
        return found

    def _first(self) -> Decoder:
        model = self.load_first()
        model.config = self.policy.model.config  # its context may differ; the weights count
        if model_digest(model) != self.first_digest:
            raise UserError(
                f"init_from no longer holds the weights that {self.run} began with, and its reference is that model. "
                "Put them back, or start a new run."
            )
        return model

    def _restore_policy(self, round_number: int, first_step: int) -> None:
        """Load the weights of the last round's end, until the checkpoint that the run resumes from is restored."""
        try:
            self.checkpoints.load_weights(first_step, self.policy.model)
        except UserError as error:
            raise UserError(
                f"{self.run}: the log-probabilities of round {round_number}'s reference are no longer in the "
                f"reference_cache, and cannot be computed again: {error} Put them back, or start a new run."
            ) from error
        if model_digest(self.policy.model) != self.digest:
            raise UserError(
                f"{self.run}: the checkpoint of step {first_step} is not that of round {round_number - 1}'s end, "
                f"which is the reference of round {round_number}. Put it back, or start a new run."
            )
