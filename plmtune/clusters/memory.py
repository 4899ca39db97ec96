"""The bytes that a process holds under a layout."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from plmtune.clusters.job import Job, StageSizes
from plmtune.clusters.orders import held_at_once
from plmtune.modules.checkpointing import Checkpointing
from plmtune.parallel.checks import micro_batches
from plmtune.parallel.layout import Layout

# Temporary tensors and fragments, as a share of what a step allocates and frees: as `training.estimate`.
SLACK = 0.2


@dataclass(frozen=True)
class Plan:
    """A layout with what else a config chooses.

    Attributes:
        checkpointing: `runtime.activation_checkpointing`.
    """

    layout: Layout
    micro_batch_size: int
    checkpointing: Checkpointing = "none"

    def micro_batches(self, job: Job) -> int:
        """Of a step on one process."""
        return micro_batches(self.layout, job.global_batch_size, self.micro_batch_size)

    def tokens(self, job: Job) -> float:
        """Of a micro-batch on one process, before tensor parallelism shares them."""
        return self.micro_batch_size * job.seq_len / self.layout.cp


@dataclass(frozen=True)
class Memory:
    """Bytes of the process that holds most.

    Attributes:
        weights: fp32; gathered: weights in the arithmetic's dtype, as FSDP2 gathers or autocast casts them.
        gradients: fp32; those that FSDP2 has not reduced yet included.
        moments: of the optimizer.
        activations: of all micro-batches in flight.
    """

    weights: float
    gathered: float
    gradients: float
    moments: float
    activations: float
    logits: float
    slack: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def memory_of(job: Job, plan: Plan) -> Memory:
    """Of the process of the pipeline that holds most."""
    found: dict[Any, Memory] = {}  # most processes are equal
    stages = job.sizes(plan.layout)
    for rank, counts in enumerate(_in_flight(plan.layout, plan.micro_batches(job))):
        key = (counts, tuple(stages[stage] for stage in plan.layout.stages_of(rank)))
        if key not in found:
            found[key] = _of_process(job, plan, *key)
    return max(found.values(), key=lambda memory: memory.total)


def _of_process(job: Job, plan: Plan, in_flight: frozenset[tuple[int, ...]], mine: tuple[StageSizes, ...]) -> Memory:
    layout, number, tokens = plan.layout, plan.micro_batches(job), plan.tokens(job)
    numel, held = sum(s.numel for s in mine), sum(s.held for s in mine)
    whole_step = layout.pp > 1 or number > 1  # weights stay gathered and gradients whole between micro-batches
    at_once = min(numel, sum(s.outside + 2 * s.layer for s in mine))  # else the layer at work and the next one
    gathered = unreduced = 0.0
    if layout.shard_size > 1:
        gathered = job.itemsize * (numel if whole_step or not layout.reshard_after_forward else at_once)
        unreduced = 4.0 * numel if whole_step else float(job.itemsize * at_once)
    elif job.itemsize < 4:  # autocast's copies, which the backward reads
        gathered = job.itemsize * (numel if "none" in job.kinds(plan.checkpointing) else at_once)
    kept = job.activations(plan.checkpointing)
    a_layer = tokens * kept_share(job, layout, kept.kept)
    activations = max(
        sum(count * s.layers * a_layer for count, s in zip(counts, mine, strict=True)) for counts in in_flight
    )
    activations += tokens * kept_share(job, layout, kept.at_work)
    logits = _logits(job, layout, tokens, next((s for s in mine if s.last), None))
    return Memory(
        weights=4.0 * held,
        gathered=gathered,
        gradients=4.0 * held + unreduced,
        moments=job.moments * held,
        activations=activations,
        logits=logits,
        slack=SLACK * (activations + logits),
    )


def _in_flight(layout: Layout, number: int) -> tuple[frozenset[tuple[int, ...]], ...]:
    """For each process of the pipeline, how many micro-batches each of its stages holds at once."""
    # More micro-batches than four a stage repeat what fewer do.
    return held_at_once(layout.schedule, layout.pp, min(number, 4 * layout.num_stages))


def kept_share(job: Job, layout: Layout, whole: float) -> float:
    """Bytes a token of a layer on one process, of `whole` bytes where one process has the layer.

    Tensor and sequence parallelism divide all but the gathered inputs of attention and FFN, and an MLA's latents;
    context parallelism adds the other processes' keys and values.
    """
    if whole <= 2 * job.model.embed_dim * job.itemsize:  # a layer's input alone
        return whole / layout.tp
    latent, _, held = job.key_values
    inputs = 2 * job.model.embed_dim + 2 * latent
    others = (layout.cp - 1) * (latent + held / layout.tp)
    return whole / layout.tp + job.itemsize * ((1 - 1 / layout.tp) * inputs + others)


def _logits(job: Job, layout: Layout, tokens: float, stage: StageSizes | None) -> float:
    """The loss's chunk of logits and the gradients by the head and the hidden states, as in `training.estimate`."""
    if stage is None:
        return 0.0
    rows, vocabulary = min(job.chunk_rows, tokens), job.model.vocab_size / layout.tp
    logits, weight = (4, 4) if job.itemsize == 4 else (2 + 4, 4 + 2 + 2)
    return logits * rows * vocabulary + weight * stage.head + job.itemsize * tokens * job.model.embed_dim
