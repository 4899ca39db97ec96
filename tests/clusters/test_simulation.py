"""Simulated processes wait for messages, meet at collectives and share links; pipelines wait as their formulas say."""

import pytest

from plmtune.clusters.orders import pipeline_order
from plmtune.clusters.programs import owner
from plmtune.clusters.simulation import Op, simulate
from plmtune.parallel.layout import Layout, Schedule


def compute(seconds: float) -> Op:
    return Op("compute", "work", seconds)


def pipeline(schedule: Schedule, pp: int, micro_batches: int) -> float:
    """Share of idle time where a stage's forward takes 1 of a process, its backward 2, and messages nothing."""
    layout = Layout(pp=pp, schedule=schedule)
    seconds = {"forward": 1.0, "backward": 2.0, "backward_input": 1.0, "backward_weight": 1.0}
    programs = []
    for rank, actions in enumerate(pipeline_order(schedule, pp, micro_batches)):
        program = []
        for kind, stage, i in actions:
            before = stage + (-1 if kind == "forward" else 1)
            after = stage + (1 if kind == "forward" else -1)
            way = "forward" if kind == "forward" else "backward"
            if kind != "backward_weight" and 0 <= before < layout.num_stages and owner(layout, before) != rank:
                program.append(Op("receive", "", key=(way, stage, i)))
            program.append(compute(seconds[kind] / layout.stages_per_rank))
            if kind != "backward_weight" and 0 <= after < layout.num_stages and owner(layout, after) != rank:
                program.append(Op("send", "", key=(way, after, i)))
        programs.append(program)
    return simulate(programs).idle


class TestPipelines:
    @pytest.mark.parametrize(("pp", "m"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 32)])
    def test_1f1b_waits_as_its_formula_says(self, pp: int, m: int) -> None:
        # (p - 1) / (m + p - 1), arXiv 2104.04473, section 2.2.1.
        assert pipeline("1f1b", pp, m) == pytest.approx((pp - 1) / (m + pp - 1))

    @pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (4, 16), (8, 32)])
    def test_two_stages_a_process_halve_the_wait(self, pp: int, m: int) -> None:
        assert pipeline("interleaved_1f1b", pp, m) == pytest.approx((pp - 1) / 2 / (m + (pp - 1) / 2))

    @pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (4, 16), (8, 32)])
    def test_zbv_waits_less_than_interleaved(self, pp: int, m: int) -> None:
        assert 0 < pipeline("zbv", pp, m) < pipeline("interleaved_1f1b", pp, m)


class TestSimulate:
    def test_a_receiver_waits_for_its_message(self) -> None:
        done = simulate([[compute(2), Op("send", "m", 3, "m", ("a",))], [Op("receive", "m", key="m"), compute(1)]])
        assert done.makespan == 6
        assert done.busy == [2, 1]

    def test_a_sender_goes_on(self) -> None:
        done = simulate([[Op("send", "m", 3, "m", ("a",)), compute(1)], [Op("receive", "m", key="m")]])
        assert [span.end for span in done.spans] == [1]

    def test_two_transfers_through_one_port_take_twice_as_long(self) -> None:
        def sent(ports: tuple[str, str]) -> float:
            sends = [[Op("send", "m", 3, port + str(i), (port,))] for i, port in enumerate(ports)]
            receives = [[Op("receive", "m", key=port + str(i))] for i, port in enumerate(ports)]
            return simulate([*sends, *receives]).makespan

        assert sent(("nic", "nic")) == 6
        assert sent(("nic a", "nic b")) == 3

    def test_a_collective_starts_with_its_last_member(self) -> None:
        meet = Op("collective", "all-reduce", 2, "key", members=2)
        done = simulate([[compute(1), meet], [compute(5), meet]])
        assert done.makespan == 7
        assert [(span.start, span.end) for span in done.spans if span.do == "collective"] == [(5, 7), (5, 7)]

    def test_a_started_collective_runs_beside_computation(self) -> None:
        program = [Op("start", "gather", 3, "key"), compute(2), Op("wait", "gather", key="key"), compute(1)]
        assert simulate([program]).makespan == 4

    def test_collectives_of_other_members_do_not_wait_for_each_other(self) -> None:
        pairs = [[Op("collective", "", 2, pair, (rank,), 2)] for rank, pair in enumerate("aabb")]
        assert simulate(pairs).makespan == 2

    def test_a_message_that_nobody_sends_is_named(self) -> None:
        with pytest.raises(ValueError, match="process 1 waits for ever: receive hidden"):
            simulate([[compute(1)], [Op("receive", "hidden", key="x")]])

    def test_nothing_takes_no_time(self) -> None:
        assert simulate([[], []]).makespan == 0
