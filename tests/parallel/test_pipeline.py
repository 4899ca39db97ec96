"""Stages of a pipeline have the names and the groups of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import KINDS, on_meta

from plmtune.parallel.pipeline import part_of
from plmtune.registry import component


@pytest.fixture
def middle() -> Any:
    """The second layer of four, without an embedding or a head, as a process of a pipeline holds it."""
    whole = on_meta(KINDS["mla"])
    part: Any = part_of(whole, range(1, 2)).to_empty(device="cpu")
    part.init_weights(torch.Generator().manual_seed(1))
    part.whole = [whole]
    return part


class TestPartOf:
    def test_names_are_those_of_the_whole_model(self, middle: Any) -> None:
        of_whole = [name for name, _ in middle.whole[0].named_parameters()]
        names = [name for name, _ in middle.named_parameters()]
        assert names == [name for name in of_whole if name.startswith("layers.1.")]


class TestGroupsOfAnOptimizer:
    @pytest.mark.parametrize(("name", "empty"), [("adamw", [False, False]), ("muon", [False, True, False])])
    def test_are_numbered_as_those_of_the_whole_model(self, middle: Any, name: str, empty: list[bool]) -> None:
        optimizer = component("optimizer", name)(model=middle)
        assert [not group["params"] for group in optimizer.param_groups] == empty

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_a_step_with_an_empty_group_moves_the_others(self, middle: Any, name: str) -> None:
        optimizer = component("optimizer", name)(model=middle)
        before = [parameter.detach().clone() for parameter in middle.parameters()]
        for parameter in middle.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, middle.parameters(), strict=True))

    def test_what_another_stage_has_may_be_left_out_of_the_decay(self, middle: Any) -> None:
        optimizer = component("optimizer", "adamw", no_decay=("tok_embeddings",))(model=middle)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(middle.parameters()))
        with pytest.raises(ValueError, match="no_decay: the model has no 'wombat'"):
            component("optimizer", "adamw", no_decay=("wombat",))(model=middle)
