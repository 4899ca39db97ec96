"""Layouts of a number of processes: which there are, which a model refuses, which do not fit, and which are fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plmtune.clusters.cluster import Cluster
from plmtune.clusters.job import Job
from plmtune.clusters.memory import Memory, Plan, memory_of
from plmtune.clusters.predict import Prediction, predict
from plmtune.errors import UserError, did_you_mean
from plmtune.parallel.checks import other_refusals, tensor_refusals
from plmtune.parallel.layout import DIMENSIONS, Layout, Schedule

_SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved_1f1b", "zbv")


@dataclass
class Found:
    """What a search found.

    Attributes:
        fitting: predictions of plans that fit, the fastest first.
        too_large: plans that need more memory than a device has, and what they need, the least first.
        refused: {sentence: number of layouts that it refuses}; a layout counts under its first sentence.
        num_layouts: that were looked at.
    """

    fitting: list[Prediction] = field(default_factory=list)
    too_large: list[tuple[Plan, Memory]] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    num_layouts: int = 0


def layouts_of(num_processes: int) -> Iterator[Layout]:
    """Each layout of so many processes, with each schedule where there is a pipeline."""
    for pp, dp_replicate, dp_shard, cp, tp in _factors(num_processes, len(DIMENSIONS)):
        for schedule in _SCHEDULES if pp > 1 else _SCHEDULES[:1]:
            yield Layout(dp_replicate, dp_shard, tp, pp, cp, schedule)


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for others in _factors(number // first, parts - 1):
                yield (first, *others)


def search(
    job: Job,
    cluster: Cluster,
    *,
    micro_batch_sizes: Sequence[int],
    checkpointings: Sequence[Any],
    fixed: Mapping[str, Any] | None = None,
) -> Found:
    """Predict every layout of the cluster's devices with every micro-batch size and kind of activation checkpointing.

    A layout whose weights FSDP2 would gather twice is predicted with both values of reshard_after_forward.

    Args:
        fixed: attributes of `Layout` that are chosen already.

    Raises:
        UserError: if no layout of so many devices has them.
    """
    found, fixed = Found(), fixed or {}
    of_model: dict[tuple[int, bool], list[str]] = {}
    for layout in layouts_of(cluster.num_devices):
        if any(getattr(layout, name) != value for name, value in fixed.items() if name != "reshard_after_forward"):
            continue
        found.num_layouts += 1
        key = (layout.tp, layout.cp > 1)
        if key not in of_model:
            of_model[key] = tensor_refusals(layout, job.model)
        sentences = of_model[key]
        plans = []
        for size in micro_batch_sizes:
            said = sentences or other_refusals(layout, job.model, job.seq_len, job.global_batch_size, size)
            if said and size == micro_batch_sizes[0]:
                found.refused[said[0]] = found.refused.get(said[0], 0) + 1
            if said:
                continue
            reshard = [each for each in _resharding(job, layout, size) if _has(each, fixed)]
            plans += [Plan(each, size, how) for each in reshard or [layout] for how in checkpointings]
        for plan in plans:
            memory = memory_of(job, plan)
            if memory.total <= cluster.available:
                found.fitting.append(predict(job, cluster, plan, memory))
            else:
                found.too_large.append((plan, memory))
    if not found.num_layouts:
        chosen = " ".join(f"parallel.{name}={value}" for name, value in fixed.items())
        raise UserError(f"{chosen}: no layout of the cluster's {cluster.num_devices:,} devices has these sizes.")
    found.fitting.sort(key=lambda prediction: prediction.seconds)
    found.too_large.sort(key=lambda each: each[1].total)
    return found


def _has(layout: Layout, fixed: Mapping[str, Any]) -> bool:
    return all(getattr(layout, name) == value for name, value in fixed.items())


def _resharding(job: Job, layout: Layout, micro_batch_size: int) -> Iterator[Layout]:
    yield layout
    plan = Plan(layout, micro_batch_size)
    if layout.shard_size > 1 and layout.pp == 1 and plan.micro_batches(job) == 1:
        sizes = {name: getattr(layout, name) for name in DIMENSIONS}
        yield Layout(**sizes, schedule=layout.schedule, reshard_after_forward=False)


def parse_layout(text: str, num_processes: int) -> Layout:
    """Read ``tp=8,pp=16,dp_shard=16``, and ``schedule=zbv``.

    Raises:
        UserError: for unknown names, sizes below 1, or a product that is not num_processes.
    """
    known = (*DIMENSIONS, "schedule")
    given: dict[str, Any] = {}
    for part in text.replace(",", " ").split():
        name, _, value = part.partition("=")
        name = name.removeprefix("parallel.")
        if name not in known:
            raise UserError(f"--layout {text}: has no {name}.{did_you_mean(name, known)}")
        if name == "schedule":
            if value not in _SCHEDULES:
                raise UserError(f"--layout {text}: there is no schedule {value}.{did_you_mean(value, _SCHEDULES)}")
            given[name] = value
        elif not value.isdigit() or int(value) < 1:
            raise UserError(f"--layout {text}: {name} must be a count of at least 1, not {value!r}.")
        else:
            given[name] = int(value)
    layout = Layout(**given)
    if layout.num_processes != num_processes:
        product = " x ".join(f"{name} {given[name]}" for name in DIMENSIONS if name in given)
        raise UserError(
            f"--layout {text}: {product or 'nothing'} is {layout.num_processes:,} processes, and the cluster has "
            f"{num_processes:,} devices."
        )
    return layout
