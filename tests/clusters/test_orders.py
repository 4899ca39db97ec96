"""Orders of pipelines are torch's."""

from typing import Any

import pytest

from plmtune.clusters.orders import held_at_once, pipeline_order
from plmtune.parallel.layout import Schedule

CASES = [(pp, number * pp) for pp in (2, 3, 4, 8) for number in (1, 2, 5)]


def torch_order(schedule: Schedule, pp: int, micro_batches: int) -> list[list[tuple[str, int, int]]]:
    """torch's order, from a schedule without stages and groups: only what the order is computed from is set."""
    from torch.distributed.pipelining import schedules

    made: Any
    if schedule == "1f1b":
        made = object.__new__(schedules.Schedule1F1B)
        made._num_stages, made._n_microbatches = pp, micro_batches
        orders = list(made._get_pipeline_order().values())
    else:
        made = object.__new__(
            schedules.ScheduleZBVZeroBubble if schedule == "zbv" else schedules.ScheduleInterleaved1F1B
        )
        made.pp_group_size, made._n_microbatches, made.n_local_stages, made.num_stages = pp, micro_batches, 2, 2 * pp
        made.number_of_rounds = max(1, micro_batches // pp)
        made.microbatches_per_round = micro_batches // made.number_of_rounds
        orders = [made._calculate_single_rank_operations(rank) for rank in range(pp)]
    kinds = {"FULL_BACKWARD": "backward", "REDUCE_GRAD": ""}
    named = [
        [
            (kinds.get(action.computation_type.name, action.computation_type.name.lower()), *action[::2])
            for action in order
            if action is not None
        ]
        for order in orders
    ]
    return [[action for action in order if action[0]] for order in named]


class TestPipelineOrder:
    @pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
    def test_equals_torchs(self, schedule: Schedule) -> None:
        for pp, micro_batches in CASES:
            ours = [[tuple(action) for action in order] for order in pipeline_order(schedule, pp, micro_batches)]
            theirs = torch_order(schedule, pp, micro_batches)
            if schedule == "1f1b":
                # torch's listing numbers the last process's forwards from 1; what it executes begins with 0.
                theirs[-1] = [(kind, stage, i - (kind == "forward")) for kind, stage, i in theirs[-1]]
            assert ours == theirs, (pp, micro_batches)

    @pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
    def test_each_stage_sees_each_micro_batch_once_in_order(self, schedule: Schedule) -> None:
        for order in pipeline_order(schedule, 4, 8):
            for stage in {action.stage for action in order}:
                for kind in {action.kind for action in order}:
                    assert [a.micro_batch for a in order if (a.stage, a.kind) == (stage, kind)] == list(range(8))

    def test_one_process_alternates(self) -> None:
        (order,) = pipeline_order("1f1b", 1, 2)
        assert [(action.kind, action.micro_batch) for action in order] == [
            ("forward", 0),
            ("backward", 0),
            ("forward", 1),
            ("backward", 1),
        ]


class TestHeldAtOnce:
    def test_1f1b_holds_as_many_as_stages_follow(self) -> None:
        assert held_at_once("1f1b", 4, 16) == tuple(frozenset({(number,)}) for number in (4, 3, 2, 1))
        assert held_at_once("1f1b", 4, 2)[0] == frozenset({(2,)})

    def test_zbv_holds_about_the_same_on_all_processes(self) -> None:
        # The paper's point (arXiv 2401.10241, section 6): as much as 1F1B's first process, which has whole stages.
        for combinations in held_at_once("zbv", 4, 32):
            assert max(map(sum, combinations)) == 2 * 4
