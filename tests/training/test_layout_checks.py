"""Forms of activation checkpointing that a schedule or a compiled layer does not allow are refused by key."""

from __future__ import annotations

import pytest
import torch

from plmtune.config.compose import compose
from plmtune.errors import UserError
from plmtune.parallel.layout import Layout
from plmtune.training.layout_checks import check_layout
from plmtune.training.runtime import Runtime

ZBV = Layout(pp=2, schedule="zbv")


def check(layout: Layout, how: str, recipe: str = "pretrain", *keys: str) -> None:
    cfg = compose(recipe, (), [f"runtime.activation_checkpointing={how}", *keys])
    check_layout(cfg, Runtime(torch.device("cpu"), torch.float32, layout), None)


class TestSelective:
    def test_zbv_whose_backward_goes_through_a_stage_twice_is_refused(self) -> None:
        with pytest.raises(UserError, match="selective keeps results for one backward"):
            check(ZBV, "selective")

    def test_zbv_takes_full_and_other_schedules_take_selective(self) -> None:
        for layout, how in ((ZBV, "full"), (ZBV, "2"), (Layout(pp=2), "selective"), (Layout(), "selective")):
            check(layout, how)

    @pytest.mark.parametrize("keys", [("sft",), ("pretrain", "document_mask=true")])
    def test_compiled_layers_whose_attention_is_not_compiled_are_refused(self, keys: tuple[str, ...]) -> None:
        with pytest.raises(UserError, match="selective is compiled with its layer"):
            check(Layout(), "selective", *keys, "runtime.compile=true")

    def test_compiled_layers_of_whole_rows_are_not(self) -> None:
        check(Layout(), "selective", "pretrain", "runtime.compile=true")
