"""Layouts are arithmetic: places of ranks, and layers of stages."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plmtune.parallel.layout import DIMENSIONS, Layout, layers_of_stages
from plmtune.parallel.plan import STYLES, divided_dimension, full_plan


class TestLayout:
    def test_coordinates_count_the_mesh_from_its_last_dimension(self) -> None:
        layout = Layout(pp=2, dp_shard=2, tp=2)
        places = [tuple(layout.coordinates(rank)[name] for name in DIMENSIONS) for rank in range(layout.num_processes)]
        assert places == list(itertools.product(*(range(getattr(layout, name)) for name in DIMENSIONS)))

    @pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
    def test_each_stage_is_held_once(self, schedule: str) -> None:
        layout = Layout(pp=4, schedule=schedule)  # type: ignore[arg-type]
        assert sorted(s for rank in range(4) for s in layout.stages_of(rank)) == list(range(layout.num_stages))

    def test_the_ends_of_a_v_are_on_one_process(self) -> None:
        assert Layout(pp=2, schedule="zbv").stages_of(0) == [0, 3]


class TestStages:
    @given(st.integers(1, 40), st.integers(1, 40))
    def test_layers_are_in_order_and_even(self, layers: int, stages: int) -> None:
        if layers < stages:
            with pytest.raises(ValueError, match=f"{layers} layers cannot fill {stages} stages"):
                layers_of_stages(layers, stages)
            return
        parts = layers_of_stages(layers, stages)
        assert [layer for part in parts for layer in part] == list(range(layers))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[-1] == min(sizes)


class TestPlan:
    def test_a_module_without_a_plan_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"a Linear \(0\) does not say"):
            full_plan(torch.nn.Sequential(torch.nn.Linear(2, 2)))

    def test_a_bias_of_rowwise_is_whole(self) -> None:
        assert divided_dimension({"down": "rowwise"}, "down.bias") is None
        assert divided_dimension({"down": "rowwise"}, "down.weight") == 1
        assert divided_dimension({"up": "colwise"}, "up.bias") == 0

    def test_the_table_of_styles_names_each(self) -> None:
        import plmtune.parallel.plan as plan

        assert all(f"\n    {style} " in (plan.__doc__ or "") for style in STYLES)
