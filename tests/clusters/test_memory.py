"""The bytes that a process holds: exact where they are numbers of parameters, and right in how they follow a layout."""

import pytest
import torch
from jobs import job_of

from plmtune.clusters.memory import Plan, memory_of
from plmtune.parallel.elements import held_elements
from plmtune.parallel.layout import Layout
from plmtune.training.activations import activation_bytes

JOB = job_of()


def held(layout: Layout, rank: int) -> int:
    return sum(held_elements(JOB.model, layout, rank).values())


class TestMemory:
    @pytest.mark.parametrize(
        "layout", [Layout(), Layout(dp_shard=4), Layout(tp=4), Layout(pp=4, tp=2, dp_shard=2)], ids=str
    )
    def test_weights_and_moments_are_the_elements_that_a_process_holds(self, layout: Layout) -> None:
        most = max(held(layout, rank) for rank in range(layout.num_processes))
        memory = memory_of(JOB, Plan(layout, 2))
        if layout.pp == 1:
            assert memory.weights == 4 * most
            assert memory.moments == 8 * most
        else:  # of the process that holds most in all, activations included
            assert memory.weights <= 4 * most
            assert memory.weights in {4 * held(layout, rank) for rank in range(layout.num_processes)}

    def test_activations_of_one_process_are_those_of_the_estimate(self) -> None:
        # But for what is outside of layers, which the formula leaves out.
        estimated = activation_bytes(JOB.model, 2, 128, torch.bfloat16, casts=False)
        ends = 2 * 128 * (2 * 64 * 2 + 64)
        assert memory_of(JOB, Plan(Layout(), 2)).activations == pytest.approx(estimated, abs=3 * ends)

    def test_checkpointing_keeps_a_layers_input(self) -> None:
        inputs = 8 * 2 * 128 * 64 * 2
        whole = memory_of(JOB, Plan(Layout(), 2)).activations
        assert inputs < memory_of(JOB, Plan(Layout(), 2, "full")).activations < inputs + whole / 4

    def test_the_first_stage_of_1f1b_holds_as_many_micro_batches_as_there_are_stages(self) -> None:
        # So four stages of a quarter of the layers hold what one process of all layers holds.
        one = memory_of(JOB, Plan(Layout(), 2)).activations
        assert memory_of(JOB, Plan(Layout(pp=4), 2)).activations == pytest.approx(one, rel=0.01)

    def test_tensor_parallelism_divides_all_but_gathered_inputs(self) -> None:
        one = memory_of(JOB, Plan(Layout(), 2)).activations
        four = memory_of(JOB, Plan(Layout(tp=4), 2)).activations
        assert one / 4 < four < one

    def test_context_parallelism_keeps_keys_and_values_of_all_tokens(self) -> None:
        one = memory_of(JOB, Plan(Layout(), 2)).activations
        two = memory_of(JOB, Plan(Layout(cp=2), 2)).activations
        latent, _, kept = JOB.key_values
        assert latent == 512 + 64
        assert two == pytest.approx(one / 2 + 8 * 128 * (latent + kept) * 2, rel=0.01)

    def test_freed_weights_take_less_than_kept_ones(self) -> None:
        one_micro_batch = job_of(rows=8)
        freed = memory_of(one_micro_batch, Plan(Layout(dp_shard=4), 2))
        kept = memory_of(one_micro_batch, Plan(Layout(dp_shard=4, reshard_after_forward=False), 2))
        assert freed.gathered < kept.gathered == 2 * JOB.parameters
        # Several micro-batches reuse the gathered weights, and sum whole gradients.
        assert memory_of(JOB, Plan(Layout(dp_shard=4), 2)).gathered == kept.gathered

    def test_in_fp32_one_process_has_no_second_copy_of_the_weights(self) -> None:
        assert memory_of(job_of(dtype=torch.float32), Plan(Layout(), 2)).gathered == 0
        assert memory_of(JOB, Plan(Layout(), 2)).gathered == 2 * JOB.parameters

    def test_the_total_is_the_sum(self) -> None:
        memory = memory_of(JOB, Plan(Layout(dp_shard=2), 2))
        assert memory.total == pytest.approx(sum(vars(memory).values()))
