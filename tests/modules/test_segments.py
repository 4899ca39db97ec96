"""Rows of several texts: attention inside each alone is what a mask over the whole row gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from plmtune.models.plm import plm
from plmtune.modules import attention_kernels as module
from plmtune.modules.attention_kernels import attend
from plmtune.modules.decoder import Decoder
from plmtune.modules.segments import Segments
from plmtune.registry import component

ROWS = [(5, 1, 10), (16,), (3, 9, 2, 2)]


class TestSegments:
    def test_the_dense_mask_is_causal_inside_each_text(self) -> None:
        dense = Segments.of(ROWS).dense
        for row, lengths in enumerate(ROWS):
            text = [index for index, length in enumerate(lengths) for _ in range(length)]
            for i in range(16):
                for j in range(16):
                    assert bool(dense[row, i, j]) == (j <= i and text[i] == text[j])

    def test_offsets_say_where_each_begins_over_all_rows(self) -> None:
        segments = Segments.of(ROWS)
        assert segments.offsets.tolist() == [0, 5, 6, 16, 32, 35, 44, 46, 48]
        assert segments.offsets.dtype == torch.int32
        assert segments.longest == 16

    @pytest.mark.parametrize("rows", [[(3, 2), (4,)], [(3, 0)], [], [()]])
    def test_lengths_that_do_not_fill_rows_of_one_size_are_refused(self, rows: list[tuple[int, ...]]) -> None:
        with pytest.raises(ValueError, match="must be positive and fill rows of one size"):
            Segments.of(rows)


def calls_for_each(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Let a CPU attend segment by segment, or over the whole row; the right choice depends on the sizes."""
    monkeypatch.setattr(module, "_SCORES_A_CALL", 0 if wanted else 1 << 40)


@pytest.fixture(params=["by segment", "whole rows"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    calls_for_each(monkeypatch, request.param == "by segment")
    yield request.param


class TestAttend:
    # query heads, KV heads, width of queries and of values
    @pytest.mark.parametrize("shape", [(4, 4, 24, 16), (4, 2, 16, 16)], ids=["values padded", "grouped"])
    def test_equals_the_dense_mask_forward_and_backward(self, road: str, shape: tuple[int, int, int, int]) -> None:
        heads, kv_heads, width, v_width = shape
        generator = torch.Generator().manual_seed(0)
        shapes = (heads, width), (kv_heads, width), (kv_heads, v_width), (heads, v_width)
        q, k, v, gradient = (torch.randn(3, h, 16, n, generator=generator) for h, n in shapes)

        def run(mask: Tensor | Segments) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = attend(leaves[0], leaves[1], leaves[2], mask, 0.2)
            return [out, *torch.autograd.grad(out, leaves, gradient)]

        segments = Segments.of(ROWS)
        for ours, dense in zip(run(segments), run(segments.dense), strict=True):
            torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)

    def test_a_cpu_attends_inside_long_segments_and_over_rows_of_short_ones(self) -> None:
        def calls(rows: list[tuple[int, ...]]) -> int:
            q = torch.zeros(len(rows), 8, sum(rows[0]), 8)
            with torch.profiler.profile() as profile:
                attend(q, q, q, Segments.of(rows), 1.0)
            return sum(event.name == "aten::scaled_dot_product_attention" for event in profile.events())

        assert calls([(128, 100, 28), (256,)]) == 4
        assert calls([(2,) * 128] * 2) == 1
        assert calls([(256,), (256,)]) == 1


def small(max_seq_len: int = 16) -> Decoder:
    torch.manual_seed(0)
    mla = component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
    ffn = component("ffn", "squared_relu", hidden_dim=96)
    sizes: dict[str, Any] = {
        "embed_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_seq_len": max_seq_len,
        "init_std": 0.15,
    }
    return plm(101, attention=mla, ffn=ffn, **sizes)


class TestDecoder:
    def positions(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.cat([torch.arange(length) for length in lengths])[None]

    @torch.no_grad()
    def test_a_row_longer_than_the_models_context_holds_texts_that_are_not(self, road: str) -> None:
        model, lengths = small(16), (16, 7, 12)
        ids = torch.randint(101, (1, 35))
        packed = model(ids, mask=Segments.of([lengths]), input_pos=self.positions(lengths))
        alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], 1)
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)

    def test_a_text_longer_than_the_context_is_refused_however_it_is_masked(self) -> None:
        model, lengths, ids = small(16), (17, 3), torch.zeros(1, 20, dtype=torch.long)
        segments, positions = Segments.of([lengths]), self.positions(lengths)
        for mask in (segments, segments.dense):
            with pytest.raises(ValueError, match=r"17 tokens exceeds the model's max_seq_len \(16\)"):
                model(ids, mask=mask, input_pos=positions)
        with pytest.raises(ValueError, match=r"20 tokens exceeds the model's max_seq_len \(16\)"):
            model(ids)

    def test_segments_and_a_cache_are_refused_together(self) -> None:
        model = small()
        with pytest.raises(ValueError, match="cannot be read piece by piece into a cache"):
            model(torch.zeros(1, 4, dtype=torch.long), mask=Segments.of([(4,)]), cache=model.new_cache(1, 8))

    def test_activation_checkpointing_gives_the_same_gradients(self, road: str) -> None:
        lengths, ids = (6, 10), torch.randint(101, (1, 16))
        gradients = []
        for checkpointing in ("none", "full", "selective"):
            model = small()
            model.activation_checkpointing = checkpointing
            model(ids, mask=Segments.of([lengths]), input_pos=self.positions(lengths)).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        for others in zip(*gradients, strict=True):
            assert all(torch.equal(others[0], other) for other in others)

    def test_compiled_layers_take_other_segments_without_being_compiled_anew(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls_for_each(monkeypatch, True)
        torch._dynamo.reset()
        plain, model = small(), small()
        graphs = 0

        def backend(graph: torch.fx.GraphModule, _: object) -> object:
            nonlocal graphs
            graphs += 1
            return graph.forward

        for layer in model.layers:
            layer.compile(backend=backend)
        seen = []
        for lengths in ((6, 10), (3, 3, 10), (1, 7, 8)):
            ids, segments = torch.randint(101, (1, 16)), Segments.of([lengths])
            with torch.no_grad():
                ours = model(ids, mask=segments, input_pos=self.positions(lengths))
                torch.testing.assert_close(ours, plain(ids, mask=segments, input_pos=self.positions(lengths)))
            seen.append(graphs)
        assert seen[0] > 0
        assert seen[1:] == seen[:1] * 2
