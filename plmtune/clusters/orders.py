"""The order in which each process of a pipeline works off its micro-batches, as torch's schedules have it.

torch.distributed.pipelining computes these orders inside schedules that need stages and process groups. Here they are
written from the papers that `parallel.layout.Layout` names, and tests compare them with torch's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from plmtune.parallel.layout import Layout, Schedule

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]


class Action(NamedTuple):
    """One stage's work on one micro-batch."""

    kind: Kind
    stage: int
    micro_batch: int


@lru_cache(maxsize=256)
def pipeline_order(schedule: Schedule, pp: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """The actions of each of pp processes, in order."""
    if pp == 1:
        steps = [(Action("forward", 0, i), Action("backward", 0, i)) for i in range(micro_batches)]
        return (tuple(action for step in steps for action in step),)
    of_rank = {"1f1b": _one_forward_one_backward, "interleaved_1f1b": _interleaved, "zbv": _zero_bubble_v}[schedule]
    return tuple(tuple(of_rank(rank, pp, micro_batches)) for rank in range(pp))


def _one_forward_one_backward(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): pp - 1 - rank forwards, then pairs, then backwards."""
    ahead = min(pp - 1 - rank, micro_batches)
    found = [Action("forward", rank, i) for i in range(ahead)]
    for i in range(micro_batches):
        if i + ahead < micro_batches:
            found.append(Action("forward", rank, i + ahead))
        found.append(Action("backward", rank, i))
    return found


def _interleaved(rank: int, pp: int, micro_batches: int, stages_per_rank: int = 2) -> list[Action]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2): rounds of micro-batches through each of a process's stages."""
    of_round = micro_batches // max(1, micro_batches // pp)
    total = stages_per_rank * micro_batches
    ahead = min((stages_per_rank - 1) * of_round + 2 * (pp - 1 - rank), total)
    done: dict[tuple[str, int], int] = {}

    def at(kind: Kind, number: int) -> Action:
        place = (number // of_round) % stages_per_rank
        stage = (place if kind == "forward" else stages_per_rank - 1 - place) * pp + rank
        micro_batch = done.get((kind, stage), 0)
        done[kind, stage] = micro_batch + 1
        return Action(kind, stage, micro_batch)

    found = [at("forward", number) for number in range(ahead)]
    for number in range(total):
        if number + ahead < total:
            found.append(at("forward", number + ahead))
        found.append(at("backward", number))
    return found


def _zero_bubble_v(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """ZB-V (arXiv 2401.10241, section 6): a stage on the way down and one on the way up, and backwards by weights where
    a process would wait."""
    # The order is made for as many micro-batches as fill the pipeline; those that there are not are left out.
    planned = max(2 * pp - 1, micro_batches)
    down, up = rank, 2 * pp - 1 - rank
    found: list[Action] = []
    done: dict[tuple[str, int], int] = {}

    def add(kind: Kind, stage: int) -> None:
        micro_batch = done.get((kind, stage), 0)
        done[kind, stage] = micro_batch + 1
        found.append(Action(kind, stage, micro_batch))

    def number(kind: Kind, stage: int) -> int:
        return done.get((kind, stage), 0)

    def backward(stage: int) -> None:
        add("backward_input", stage)
        add("backward_weight", stage)

    for _ in range(2 * (pp - rank) - 1):
        add("forward", down)
    for _ in range(rank):
        add("forward", up)
        add("forward", down)
    for _ in range(pp - rank):
        add("forward", up)
        backward(up)
    while number("forward", up) < number("forward", down) or number("forward", down) < planned:
        if number("forward", down) < planned:
            add("forward", down)
        backward(down)
        add("forward", up)
        backward(up)
    for _ in range(rank):
        add("backward_input", down)
        add("backward_input", up)
    for _ in range(pp - rank):
        backward(down)
    for stage in (up, down):
        while number("backward_weight", stage) < number("backward_input", stage):
            add("backward_weight", stage)
    return [action for action in found if action.micro_batch < micro_batches]


@lru_cache(maxsize=256)
def held_at_once(schedule: Schedule, pp: int, micro_batches: int) -> tuple[frozenset[tuple[int, ...]], ...]:
    """For each process, the largest combinations of micro-batches whose activations its stages hold at once.

    A combination has a number for each stage, in the order of `Layout.stages_of`. A micro-batch is held from its
    forward to its backward, to that by weights where both are apart.
    """
    layout = Layout(pp=pp, schedule=schedule)
    found = []
    for rank, actions in enumerate(pipeline_order(schedule, pp, micro_batches)):
        place = {stage: i for i, stage in enumerate(layout.stages_of(rank))}
        held = [0] * len(place)
        seen = set()
        for action in actions:
            if action.kind == "forward":
                held[place[action.stage]] += 1
                seen.add(tuple(held))
            elif action.kind != "backward_input":
                held[place[action.stage]] -= 1
        found.append(frozenset(one for one in seen if not any(_exceeds(other, one) for other in seen)))
    return tuple(found)


def _exceeds(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
