"""Layouts that a model or its batches do not allow are refused in sentences that name the keys."""

from typing import Any

import pytest
import torch

from plmtune.parallel.checks import micro_batches, refusals
from plmtune.parallel.layout import Layout
from plmtune.registry import Component, component


def built(name: str, vocab_size: int = 512, **settings: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = component("model", name, embed_dim=96, **settings)(vocab_size=vocab_size)
    return model


@pytest.fixture(scope="module")
def plm() -> torch.nn.Module:
    return built("plm", num_layers=4, num_heads=6, ffn=component("ffn", "squared_relu", hidden_dim=128))


def said(layout: Layout, model: torch.nn.Module, *, seq_len: int = 64, rows: int = 16, micro: int = 2) -> list[str]:
    return refusals(layout, model, seq_len=seq_len, global_batch_size=rows, micro_batch_size=micro)


class TestAllowed:
    @pytest.mark.parametrize(
        "layout",
        [
            Layout(),
            Layout(tp=2, pp=2, dp_shard=2, cp=2),
            Layout(pp=4, dp_replicate=2),
            Layout(pp=2, schedule="interleaved_1f1b"),
            Layout(pp=2, dp_shard=8, schedule="zbv"),
        ],
        ids=str,
    )
    def test_nothing_is_said_of_a_layout_that_fits(self, layout: Layout, plm: torch.nn.Module) -> None:
        assert said(layout, plm) == []

    def test_micro_batches_of_a_process(self) -> None:
        assert micro_batches(Layout(dp_replicate=2, dp_shard=4, cp=2, tp=2), 64, 2) == 4


class TestRefusals:
    def test_each_size_that_tp_does_not_divide_is_named_once(self, plm: torch.nn.Module) -> None:
        assert said(Layout(tp=4), plm) == ["parallel.tp: 4 does not divide the 6 heads of layer 0"]
        assert said(Layout(tp=3), plm) == [
            "parallel.tp: 3 does not divide the vocabulary of 512",
            "parallel.tp: 3 does not divide the hidden_dim of 128 in the FFN of layer 0",
            "parallel.tp: 3 does not divide seq_len 64, which its processes share between layers",
        ]

    def test_key_and_value_heads(self) -> None:
        model = built("llama", num_layers=1, num_heads=8, attention=component("attention", "gqa", num_kv_heads=2))
        assert said(Layout(tp=4), model) == ["parallel.tp: 4 does not divide the 2 key and value heads of layer 0"]

    def test_learned_positions(self) -> None:
        model = built("pangu_alpha", num_layers=2, num_heads=4, max_seq_len=70, attention=_mha(4))
        assert said(Layout(tp=4), model) == [
            "parallel.tp: 4 does not divide the 70 learned positions (model.max_seq_len)"
        ]

    def test_attention_shortcuts_have_no_plan(self) -> None:
        attention = component("attention", "mla", shortcut=component("shortcut", "augmented"))
        model = built("plm", num_layers=1, num_heads=4, attention=attention)
        assert said(Layout(dp_shard=2), model) == []
        assert said(Layout(tp=2), model) == [
            "parallel.tp: the attention shortcut of layer 0 is not divided between processes. Set parallel.tp=1"
        ]

    def test_a_module_without_a_plan(self, plm: torch.nn.Module) -> None:
        model = built("plm", num_layers=1, num_heads=4)
        model.score = torch.nn.Linear(96, 1, bias=False, device="meta")
        (sentence,) = said(Layout(tp=2), model)
        assert sentence.startswith("parallel.tp: a Linear (score) does not say how")

    def test_sequences_are_two_parts_a_process(self, plm: torch.nn.Module) -> None:
        assert said(Layout(cp=3), plm) == [
            "parallel.cp: 3 processes share 6 equal parts of each sequence, which do not divide seq_len 64"
        ]
        assert said(Layout(cp=2, tp=6), plm)[-1] == (
            "parallel.tp: 6 does not divide 32 tokens (seq_len 64 / parallel.cp 2), which its processes share between "
            "layers"
        )

    def test_layers_fewer_than_stages(self, plm: torch.nn.Module) -> None:
        assert said(Layout(pp=8), plm) == ["parallel.pp: 4 layers cannot fill 8 stages: each needs one"]
        assert said(Layout(pp=4, schedule="zbv"), plm) == [
            "parallel.pp: 4 layers cannot fill 8 stages: each needs one (zbv has 2 stages on each of 4 processes)"
        ]

    def test_a_batch_that_processes_do_not_divide(self, plm: torch.nn.Module) -> None:
        assert said(Layout(dp_shard=3, dp_replicate=2), plm) == [
            "global_batch_size: 16 is not a multiple of 12 (parallel.dp_replicate 2 x parallel.dp_shard 3 x "
            "micro_batch_size 2)"
        ]

    def test_fewer_micro_batches_than_stages(self, plm: torch.nn.Module) -> None:
        assert said(Layout(pp=4, dp_shard=4), plm) == [
            "parallel.pp: 4 stages need 4 micro-batches a step or more, and there are 2 (global_batch_size 16 / 8 rows "
            "of all data processes' micro-batches)"
        ]
        assert said(Layout(pp=2, schedule="interleaved_1f1b"), plm, rows=6) == [
            "parallel.schedule: interleaved_1f1b takes a multiple of parallel.pp 2 as micro-batches, and there are 3 "
            "(global_batch_size 6 / 2 rows of all data processes' micro-batches)"
        ]


def _mha(heads: int) -> Component:
    return component("attention", "gqa", num_kv_heads=heads, rope=False, bias=True)
