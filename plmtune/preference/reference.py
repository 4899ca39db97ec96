"""The reference of preference training: the fixed model with which the policy is compared.

Its log-probabilities are computed once and kept on disk. A directory holds for each key KEY.safetensors, the numbers,
and KEY.json, checksummed, written last, with the former's length and checksum. The key is a hash of the weights
themselves, the arithmetic, and each id, position and mask that goes in: with any other of them it is another key, so
numbers of another reference are never found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from plmtune.errors import UserError
from plmtune.io import checked_tensors
from plmtune.models.digest import add_tensor, model_digest
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import adapter_parameters, disabled
from plmtune.preference.batches import PreferenceBatches
from plmtune.preference.comparisons import ComparisonBatch
from plmtune.preference.scorer import AnswerScorer
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.distributed import broadcast_from_rank0, gather_texts, reduce_sum
from plmtune.training.finetune_model import FinetuneModel
from plmtune.training.monitor import RunMonitor

_VERSION = 2  # of the files and of the input of the key's hash
# Field of a batch -> the name under which it is hashed, so that caches of earlier versions fit.
_INPUTS = {name: name for name in ("tokens", "input_pos", "mask", "positions", "targets", "completion", "index")}
_INPUTS["positions"] = "places"


def reference_log_probs(
    model_digest: str,
    batches: Callable[[], Iterable[ComparisonBatch]],
    compute: Callable[[ComparisonBatch], Tensor],
    directory: str | Path,
    num: int,
    *,
    arithmetic: str,
    log: Callable[[str], None],
) -> Tensor:
    """The reference's log-probabilities of each comparison's answers, read from the cache or computed and cached.

    Every rank must call it; only rank 0 reads and writes.

    Args:
        batches: returns this rank's share of all comparisons (`PreferenceBatches.all`): the same number of batches on
            every rank, some perhaps empty. Called twice, to hash and to compute, so that they are never all in memory.
        compute: (batch) -> log-probabilities of its answers, [2n], in the order of `lengths`.
        num: comparisons in the data; `batch.index` is below it.
        arithmetic: device and dtype of the computation.
        log: takes a line about a damaged file.

    Returns:
        Tensor: fp32 on the CPU, [num, 2]: chosen, rejected; 0 for an answer without tokens, NaN for a comparison
        that is in no batch.
    """
    path = Path(directory) / f"{_key(model_digest, batches(), num, arithmetic)}.safetensors"
    values = torch.zeros(num, 2)

    def find() -> bool:
        held = _read(path, num, log)
        if held is not None:
            values.copy_(held)
        return held is not None

    if broadcast_from_rank0(find):
        return reduce_sum(values)  # the others hold zeros
    values = _compute(batches(), compute, num)
    broadcast_from_rank0(lambda: _write(path, values))
    return values


def _key(model_digest: str, batches: Iterable[ComparisonBatch], num: int, arithmetic: str) -> str:
    """The key, equal on every rank and for any number of ranks. It depends on the rows, as rounding does."""
    mine = []
    for batch in batches:
        digest = xxhash.xxh3_128()
        for field, name in _INPUTS.items():
            add_tensor(digest, name, getattr(batch, field))
        mine.append(digest.hexdigest() if len(batch.index) else "")
    shares = [json.loads(text) for text in gather_texts(json.dumps(mine))]
    in_turn = [digest for digests in zip(*shares, strict=True) for digest in digests if digest]
    # Versions of torch may round differently.
    parts = [_VERSION, model_digest, arithmetic, torch.__version__, num, *in_turn]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


@torch.no_grad()
def _compute(batches: Iterable[ComparisonBatch], compute: Callable[[ComparisonBatch], Tensor], num: int) -> Tensor:
    """[num, 2] on every rank."""
    values, times = torch.zeros(num, 2), torch.zeros(num)
    for batch in batches:
        index = batch.index.cpu()
        values.index_add_(0, index, compute(batch).float().cpu().view(-1, 2))
        times.index_add_(0, index, torch.ones(len(index)))
    reduce_sum(values)
    reduce_sum(times)
    values /= times.clamp(min=1)[:, None]  # the mean, where a comparison is in several batches
    bad = (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        chosen, rejected = values[bad[0]].tolist()
        raise UserError(
            f"The reference gives the answers of comparison {bad[0]} the log-probabilities {chosen} and {rejected}; "
            f"{len(bad)} of {num} comparisons have one that is not finite. Has the model's training diverged?"
        )
    values[times == 0] = float("nan")  # it is in no batch
    return values


def _read(path: Path, num: int, log: Callable[[str], None]) -> Tensor | None:
    """The cached numbers; None if there are none, or, with a logged line, if they cannot be used."""
    note = path.with_suffix(".json")
    if not note.exists():  # written last
        return None
    try:
        tensors, document = checked_tensors.load(path)
        if document.get("key") != path.stem:
            raise ValueError(f"it is of the key {document.get('key')}")
        values = tensors["log_probs"]
        if values.shape != (num, 2) or values.dtype != torch.float32:
            raise ValueError(f"{path.name} holds {values.dtype} {list(values.shape)}, not {[num, 2]}")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        log(f"{note}: the reference's log-probabilities kept here cannot be used ({error}); they are computed again.")
        return None
    return values


def _write(path: Path, values: Tensor) -> None:
    try:
        checked_tensors.save(path, {"log_probs": values}, {"key": path.stem})
    except OSError as error:
        raise UserError(f"The reference's log-probabilities cannot be kept: {error}. See reference_cache.") from error


@dataclass(eq=False)
class ReferenceModel:
    """Computes the reference's log-probabilities at the start of a stage, which trains on all pairs or on a round's.

    The reference is the model that the run began with, or with ``which="previous"`` the policy at the start of each
    round. Its weights come from the policy before the stage's first step, from the policy without its adapters, from a
    checkpoint of the run, or from `init_from`.
    """

    policy: FinetuneModel
    which: Literal["previous", "first"]  # the config's `reference`
    score: AnswerScorer
    load_first: Callable[[], Decoder]  # loads a second model with the run's initial weights
    checkpoints: Checkpoints
    run: Path  # the run's directory, for messages
    digest: str = ""  # of this stage's reference, as the checkpoint has it; empty for a new run
    first_digest: str = ""  # of the weights that the run began with

    def log_probs(
        self, data: PreferenceBatches, round_number: int, *, first_step: int, step: int, cache: str, monitor: RunMonitor
    ) -> Tensor:
        """Return the log-probabilities of every answer of a stage, [comparisons, 2], computed or read from the cache.

        They are zeros for a loss without a reference, and where the stage has no step left. Every rank must call it.

        Args:
            round_number: of the stage; 0 is a run without rounds.
            first_step: step of the run at which the stage begins.
            step: that the policy is at.
        """
        device, untrained = self.score.runtime.device, step == first_step
        policy, is_first = self.policy, round_number <= 1 or self.which == "first"
        zeros = torch.zeros(len(data.comparisons), 2, device=device)
        if not self.score.loss.needs_reference:
            return zeros
        # Keep the weights of a later round's reference: the cache may lose its numbers.
        self.checkpoints.pinned = None if is_first else first_step
        if step == first_step + data.num_steps:
            return zeros
        if untrained:
            if is_first and (round_number <= 1 or policy.adapter_config):
                adapters = set(adapter_parameters(policy.model)) if policy.adapter_config else set()
                self.first_digest = model_digest(policy.model, without=adapters)
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
                    with disabled(policy.model):
                        return self.score(batch)
                if not is_first or (untrained and round_number <= 1):
                    return self.score(batch)
                second[:] = second or [self._first()]
                return self.score(batch, second[0])

        policy.model.eval()
        arithmetic = f"{device.type} {self.score.runtime.compute_dtype}"
        num, log = len(data.comparisons), monitor.message
        found = reference_log_probs(self.digest, data.all, compute, cache, num, arithmetic=arithmetic, log=log)
        policy.model.train()
        if done and not untrained:
            monitor.message(
                f"reference: {cache} has no log-probabilities for this resume (in bf16 they depend on micro_batch_size "
                f"and the number of processes); computed again {'from init_from' if second else 'from kept weights'}"
            )
        how = "computed, and kept in" if done else "read from"
        monitor.message(f"reference: log-probabilities {how} {cache}")
        found = found.to(device)
        if untrained and (round_number <= 1 or self.which == "previous"):  # the policy is the reference
            batch = data.step(0)[0]
            with torch.no_grad(), self.policy.fake_quant_disabled():
                difference = (self.score(batch).view(-1, 2) - found[batch.index.to(device)]).abs()
            largest = float(difference.max()) if difference.numel() else 0.0
            monitor.message(f"reference: log-probabilities of the first step differ by at most {largest:.2g}")
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
