"""Bytes over links are those of rings, and seconds follow them."""

from typing import Any

import pytest
from jobs import job_of

from plmtune.clusters.cluster import Cluster, load_cluster
from plmtune.clusters.costs import Costs
from plmtune.clusters.memory import Plan
from plmtune.clusters.traffic import Sent, in_one_node, ring, stride_and_size, to_next_stage
from plmtune.parallel.layout import Layout

ONE, FOUR = load_cluster("h100"), load_cluster("h100").of_processes(32)


def sent(job_rows: int, layout: Layout, cluster: Cluster, *, checkpointing: Any = "none") -> dict[str, Sent]:
    costs = Costs(job_of(rows=job_rows), cluster, Plan(layout, 2, checkpointing))
    return {each.dimension: each for each in costs.traffic()}


class TestGroups:
    def test_strides_are_those_of_the_mesh(self) -> None:
        layout = Layout(dp_replicate=2, dp_shard=3, tp=4, pp=5, cp=7)
        assert stride_and_size(layout, "tp") == (1, 4)
        assert stride_and_size(layout, "cp") == (4, 7)
        assert stride_and_size(layout, "dp_shard") == (28, 3)
        assert stride_and_size(layout, "fsdp") == (4, 21)
        assert stride_and_size(layout, "pp") == (4 * 7 * 3 * 2, 5)

    def test_members_of_a_group_in_one_node_are_counted(self) -> None:
        layout = Layout(tp=4, dp_shard=8)
        assert in_one_node(layout, "tp", 8) == 4
        assert in_one_node(layout, "dp_shard", 8) == 2
        for dimension in ("tp", "dp_shard"):
            group = [r for r in range(32) if all(
                layout.coordinates(r)[n] == 0 for n in ("tp", "dp_shard") if n != dimension)]  # fmt: skip
            assert in_one_node(layout, dimension, 8) == sum(r < 8 for r in group)


class TestRing:
    def test_a_group_in_one_node_sends_nothing_between_nodes(self) -> None:
        found = ring(Layout(tp=4, dp_shard=8), FOUR, "tp", 100.0)
        assert (found.node, found.network) == (75.0, 0.0)

    def test_one_of_the_processes_of_a_node_sends_to_the_next_node(self) -> None:
        found = ring(Layout(tp=4, dp_shard=8), FOUR, "dp_shard", 80.0)
        assert found.node == found.network == 35.0
        whole = ring(Layout(dp_shard=32), FOUR, "fsdp", 32.0)
        assert (whole.node, whole.network) == (pytest.approx(31 * 7 / 8), pytest.approx(31 / 8))

    def test_the_slower_link_counts(self) -> None:
        found = Sent("fsdp", node=370e9, network=84e9, operations=0)
        assert found.seconds(FOUR) == pytest.approx(2)

    def test_a_group_of_one_sends_nothing(self) -> None:
        assert ring(Layout(), ONE, "tp", 100.0).seconds(ONE) == 0

    def test_stages_in_other_nodes_are_reached_by_the_network(self) -> None:
        assert to_next_stage(Layout(pp=4, dp_shard=8), FOUR, 10.0).network == 10.0
        assert to_next_stage(Layout(pp=8), ONE, 10.0).node == 10.0


class TestTraffic:
    def test_fsdp_gathers_in_bf16_and_reduces_in_fp32(self) -> None:
        job = job_of()
        found = sent(64, Layout(dp_shard=8), ONE)["fsdp"]
        assert found.node == pytest.approx((2 + 4) * job.parameters * 7 / 8)
        # With one micro-batch the weights are freed after the forward and gathered again.
        assert sent(16, Layout(dp_shard=8), ONE)["fsdp"].node == pytest.approx((4 + 4) * job.parameters * 7 / 8)
        kept = Layout(dp_shard=8, reshard_after_forward=False)
        assert sent(16, kept, ONE)["fsdp"].node == found.node

    def test_copies_all_reduce_their_shards(self) -> None:
        job = job_of()
        assert sent(64, Layout(dp_replicate=8), ONE)["dp_replicate"].node == pytest.approx(
            2 * 4 * job.parameters * 7 / 8
        )
        hsdp = sent(64, Layout(dp_replicate=2, dp_shard=4), ONE)
        assert hsdp["dp_replicate"].node == pytest.approx(4 * job.parameters / 4, rel=0.01)

    def test_tensor_parallelism_sends_hidden_states_four_times_a_layer_and_way(self) -> None:
        hidden = 2 * 128 * 64 * 2  # bytes of a micro-batch
        micro_batches, half = 32, 1 / 2
        latents = 2 * 2 * 128 * (512 + 64) * 2 * 8  # an all-reduce of an MLA's gradients by latents a layer
        ends = 2 * 2 * hidden  # embedding and head, both ways
        expected = micro_batches * half * (2 * 4 * 8 * hidden + latents + ends)
        assert sent(64, Layout(tp=2), ONE)["tp"].node == pytest.approx(expected)

    def test_checkpointing_sends_the_forward_again(self) -> None:
        forwards = {"tp": 32 * 4 * 8 * 2 * 128 * 64 * 2 / 2, "cp": 8 * 64 * 128 * (512 + 64) * 2 / 2}
        for dimension, layout in (("tp", Layout(tp=2)), ("cp", Layout(cp=2))):
            off, on = (sent(64, layout, ONE, checkpointing=how)[dimension].node for how in ("none", "full"))
            assert on - off == pytest.approx(forwards[dimension])

    def test_context_parallelism_sends_latents_and_their_gradients(self) -> None:
        a_token = (512 + 64) * 2
        assert sent(64, Layout(cp=2), ONE)["cp"].node == pytest.approx(2 * 8 * 64 * 128 * a_token / 2)

    def test_a_middle_stage_sends_hidden_states_on_and_gradients_back(self) -> None:
        job = job_of(tie_embeddings=False)
        costs = Costs(job, ONE, Plan(Layout(pp=4), 2))
        found = {each.dimension: each for each in costs._traffic_of(1)}
        assert found["pp"].node == 2 * 64 * 128 * 64 * 2

    def test_the_ends_of_a_pipeline_add_up_gradients_of_a_tied_embedding(self) -> None:
        job = job_of()
        assert Costs(job, ONE, Plan(Layout(pp=2), 2)).tied().node == 4 * 512 * 64
        assert Costs(job, ONE, Plan(Layout(pp=2, schedule="zbv"), 2)).tied().node == 0
