"""One process tries ranks of many: divided modules have the shapes that arithmetic says, and a wrong plan is named."""

from typing import Any

import pytest
import torch

from plmtune.modules.gqa import GroupedQueryAttention
from plmtune.parallel import simulate as module
from plmtune.parallel.layout import Layout
from plmtune.parallel.simulate import Simulation, representatives, simulate, tiles
from plmtune.registry import component


def small() -> Any:
    attention = component("attention", "gqa", num_kv_heads=4)
    with torch.device("meta"):
        return component("model", "llama", embed_dim=32, num_layers=4, num_heads=4, attention=attention)(vocab_size=128)


def tried(layout: Layout, model: Any = None, ranks: Any = None) -> Simulation:
    return simulate(
        small() if model is None else model,
        layout,
        batch=(2, 16),
        dtype=torch.bfloat16,
        optimizer_of=lambda model: torch.optim.AdamW(model.parameters()),
        ranks=ranks,
    )


class TestSimulate:
    @pytest.mark.parametrize(
        "layout",
        [
            Layout(dp_shard=4, tp=4, pp=4),
            Layout(dp_replicate=2, dp_shard=8, tp=2, pp=2, schedule="zbv"),
            Layout(dp_replicate=64),
        ],
        ids=str,
    )
    def test_64_ranks_have_the_predicted_shapes(self, layout: Layout) -> None:
        found = tried(layout)
        assert found.failures == []
        assert list(found.held) == representatives(layout)

    def test_a_wrong_plan_is_found_and_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = GroupedQueryAttention.parallel_plan
        monkeypatch.setattr(GroupedQueryAttention, "parallel_plan", lambda self: {**right(self), "o_proj": "colwise"})
        found = tried(Layout(tp=4, dp_shard=16), ranks=[0])
        assert any("rank 0" in sentence for sentence in found.failures), found.failures

    def test_a_shard_of_another_size_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = module.held_elements
        monkeypatch.setattr(module, "held_elements", lambda *args: {**right(*args), "norm.weight": 7})
        found = tried(Layout(dp_shard=64), ranks=[0])
        assert found.failures == ["rank 0: norm.weight has 1 numbers here, and elements.py says 7"]

    @pytest.mark.slow
    def test_2048_ranks(self) -> None:
        found = tried(Layout(tp=4, pp=4, dp_shard=128))
        assert found.failures == []


class TestRepresentatives:
    def test_are_first_ranks_of_stages_and_corners_of_the_ends(self) -> None:
        assert representatives(Layout(tp=2, dp_shard=3, pp=3)) == [0, 1, 4, 5, 6, 12, 13, 16, 17]


class TestTiles:
    def test_a_grid_fills_a_tensor(self) -> None:
        assert tiles((4, 2), {((0, 2), (0, 2)), ((2, 4), (0, 2))})

    @pytest.mark.parametrize("second", [((1, 4), (0, 2)), ((3, 4), (0, 2)), ((2, 4), (0, 1))])
    def test_gaps_and_overlaps_do_not(self, second: Any) -> None:
        assert not tiles((4, 2), {((0, 2), (0, 2)), second})
