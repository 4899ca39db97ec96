"""Predictions: the formula agrees with the simulation of the same step, and layouts are ranked as they must be."""

from typing import Any

import pytest
import torch
from jobs import job_of

from plmtune.clusters.cluster import load_cluster
from plmtune.clusters.job import Job
from plmtune.clusters.layouts import layouts_of, parse_layout, search
from plmtune.clusters.memory import Plan
from plmtune.clusters.predict import predict
from plmtune.clusters.programs import simulate_plan
from plmtune.errors import UserError
from plmtune.parallel.layout import Layout
from plmtune.registry import Component, component

H100 = load_cluster("h100")


def mha(heads: int) -> Component:
    return component("attention", "gqa", num_kv_heads=heads, rope=False, bias=True)


@pytest.fixture(scope="module")
def plm() -> Job:
    with torch.device("meta"):
        model: Any = component("model", "plm")(vocab_size=151936)
    return Job(model, seq_len=4096, global_batch_size=64, dtype=torch.bfloat16)


class TestFormula:
    @pytest.mark.parametrize(
        ("layout", "rows"),
        [
            (Layout(dp_shard=8), 64),
            (Layout(pp=4, tp=2), 64),
            (Layout(pp=4, dp_shard=2, schedule="interleaved_1f1b"), 64),
            (Layout(pp=4, tp=2, schedule="zbv"), 64),
            (Layout(pp=2, cp=2, tp=2), 64),
            (Layout(pp=4, dp_shard=2, tp=2), 64),
            (Layout(dp_replicate=2, dp_shard=8), 64),
        ],
        ids=str,
    )
    def test_agrees_with_the_simulation(self, plm: Job, layout: Layout, rows: int) -> None:
        cluster = H100.of_processes(layout.num_processes)
        predicted = predict(plm, cluster, Plan(layout, 2)).seconds
        for every in (True, False):
            simulated = simulate_plan(plm, cluster, Plan(layout, 2), all_processes=every)
            assert simulated.makespan == pytest.approx(predicted, rel=0.03)

    def test_one_process_computes_all_the_time(self, plm: Job) -> None:
        terms = predict(plm, H100.of_processes(1), Plan(Layout(), 2)).terms
        assert terms.tp == terms.cp == terms.bubble == terms.fsdp == terms.dp_replicate == 0
        flops = plm.tokens * (6 * plm.multiplied + plm.attention * 3 * 32)
        assert terms.products == pytest.approx(flops / H100.products)

    def test_flops_are_those_of_the_estimate(self) -> None:
        from plmtune.training.estimate import estimate
        from plmtune.training.runtime import Runtime

        runtime = Runtime(torch.device("cpu"), torch.bfloat16)
        for job in (
            job_of(),
            job_of("llama", tie_embeddings=False, attention=component("attention", "gqa", num_kv_heads=2)),
            job_of("pangu_alpha", attention=mha(4)),
        ):
            estimated = estimate(job.model, runtime, optimizer="adamw", seq_len=128, micro_batch_size=1)
            tables = ("pos_embeddings", "query_embeddings")  # the estimate counts them as multiplied
            read = [getattr(job.model, name, None) for name in tables]
            rows = sum(each.weight.numel() for each in read if each is not None)
            assert job.flops_per_token == estimated.flops_per_token - 6 * rows

    def test_a_pipeline_waits_less_with_more_micro_batches(self, plm: Job) -> None:
        few, many = (predict(plm, H100, Plan(Layout(pp=8), size)).bubble for size in (8, 1))
        assert few > 2 * many

    def test_checkpointing_costs_a_forward(self, plm: Job) -> None:
        off, on = (predict(plm, H100, Plan(Layout(dp_shard=8), 2, how)) for how in ("none", "full"))
        assert 1.2 < on.seconds / off.seconds < 1.4
        assert on.memory.activations < off.memory.activations / 3

    def test_tensor_parallelism_between_nodes_is_slow(self, plm: Job) -> None:
        cluster = H100.of_processes(16)
        inside = predict(plm, cluster, Plan(Layout(tp=8, dp_shard=2), 2))
        across = predict(plm, cluster, Plan(Layout(tp=16), 2))
        assert across.terms.tp > 2 * inside.terms.tp

    def test_launches_bound_small_work(self) -> None:
        terms = predict(job_of(), H100, Plan(Layout(dp_shard=8), 1)).terms
        assert terms.launches > 10 * terms.products


class TestSearch:
    def test_layouts_are_all_factorisations(self) -> None:
        found = list(layouts_of(8))
        assert len(found) == len(set(found)) == 35 + 2 * 15  # 35 ordered products of five, 15 of them with a pipeline
        assert {layout.num_processes for layout in found} == {8}

    def test_every_layout_is_refused_too_large_or_ranked(self) -> None:
        job = job_of(num_layers=4, rows=16)
        found = search(job, H100, micro_batch_sizes=[1, 2], checkpointings=["none"])
        ranked = {(p.plan.layout.tp, p.plan.layout.pp) for p in found.fitting}
        assert sum(found.refused.values()) > 0
        assert found.num_layouts == len(list(layouts_of(8)))
        assert (8, 1) not in ranked
        assert "parallel.tp: 8 does not divide the 4 heads of layer 0" in found.refused
        assert [p.seconds for p in found.fitting] == sorted(p.seconds for p in found.fitting)

    def test_keys_fix_dimensions(self) -> None:
        job = job_of(rows=16)
        found = search(job, H100, micro_batch_sizes=[1], checkpointings=["full"], fixed={"tp": 2, "schedule": "zbv"})
        assert {(p.plan.layout.tp, p.plan.layout.schedule) for p in found.fitting} == {(2, "zbv")}
        with pytest.raises(UserError, match=r"parallel\.tp=3: no layout of the cluster's 8 devices has these sizes"):
            search(job, H100, micro_batch_sizes=[1], checkpointings=["full"], fixed={"tp": 3})

    def test_what_does_not_fit_is_listed_the_least_first(self, plm: Job) -> None:
        found = search(plm, load_cluster("gloo"), micro_batch_sizes=[1], checkpointings=["full"], fixed={"tp": 2})
        needed = [memory.total for _, memory in found.too_large]
        assert not found.fitting
        assert needed == sorted(needed)
        assert needed[0] > load_cluster("gloo").available


class TestParseLayout:
    def test_reads_sizes_and_schedule(self) -> None:
        assert parse_layout("tp=8,pp=16,dp_shard=16", 2048) == Layout(tp=8, pp=16, dp_shard=16)
        assert parse_layout("parallel.pp=2 schedule=zbv", 2).schedule == "zbv"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("tp=4", "tp 4 is 4 processes, and the cluster has 8 devices"),
            ("tpp=8", "has no tpp. Did you mean tp"),
            ("tp=x", "tp must be a count of at least 1, not 'x'"),
            ("tp=0", "tp must be a count of at least 1, not '0'"),
            ("pp=8,schedule=gpipe", "there is no schedule gpipe"),
        ],
    )
    def test_mistakes_are_sentences(self, text: str, says: str) -> None:
        with pytest.raises(UserError, match=says):
            parse_layout(text, 8)
