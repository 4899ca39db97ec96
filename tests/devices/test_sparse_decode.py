"""Sparse decode: the same tokens, less read; switched on by measurement."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_plm

from plmtune.devices import sparse_decode
from plmtune.models.hf import load_model, save_model
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SquaredReLU
from plmtune.modules.quantized import Format, install
from plmtune.registry import component


def small(dtype: torch.dtype = torch.float32) -> Decoder:
    model = tiny_plm(
        97,
        mla={"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        embed_dim=32,
        num_layers=3,
    )
    return model.to(dtype).eval().requires_grad_(False)


@torch.inference_mode()
def greedy(model: Decoder, count: int) -> tuple[list[int], torch.Tensor]:
    cache = model.new_cache(1, 64)
    ids, rows = torch.tensor([[1, 2, 3]]), []
    written = []
    for _ in range(count):
        rows.append(model(ids, cache=cache)[0, -1])
        ids = rows[-1].argmax().view(1, 1)
        written.append(int(ids))
    return written, torch.stack(rows)


class TestSparse:
    def test_greedy_tokens_and_logits_are_those_of_dense_decoding(self) -> None:
        model = small()
        tokens, logits = greedy(model, 24)
        sparse_decode.switch(model, True)
        assert [ffn.sparse for ffn in sparse_decode.squared_relus(model).values()] == [True] * 3
        skipped, sparse_logits = greedy(model, 24)
        assert len(set(tokens)) > 3
        assert skipped == tokens
        torch.testing.assert_close(sparse_logits, logits, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_bf16_is_rounded_no_worse_than_dense_with_any_number_of_threads(self, threads: int) -> None:
        torch.manual_seed(0)
        ffn = SquaredReLU(62, hidden_dim=512).to(torch.bfloat16).requires_grad_(False)
        hidden = torch.randn(1, 1, 512).relu().square().to(torch.bfloat16)
        exact = hidden.double() @ ffn.down_proj.weight.double().t()
        dense = (ffn.down_proj(hidden) - exact).abs().mean()
        ffn.sparse = True
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            assert (ffn.skip_zeros(hidden) - exact).abs().mean() <= 1.01 * dense
        finally:
            torch.set_num_threads(before)

    def test_a_row_of_zeros_gives_zeros(self) -> None:
        ffn = SquaredReLU(16, hidden_dim=32)
        ffn.sparse = True
        assert torch.equal(ffn.skip_zeros(torch.zeros(1, 1, 32)), torch.zeros(1, 1, 16))

    def test_only_a_single_row_without_gradients_skips(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ffn = SquaredReLU(16, hidden_dim=32)
        ffn.sparse = True
        calls = []

        def skip(hidden: torch.Tensor) -> torch.Tensor:
            calls.append(hidden.shape)
            return torch.zeros(1, 1, 16)

        monkeypatch.setattr(ffn, "skip_zeros", skip)
        ffn(torch.randn(1, 1, 16))
        with torch.no_grad():
            ffn(torch.randn(1, 2, 16))
            assert calls == []
            ffn(torch.randn(1, 1, 16))
        assert calls == [torch.Size([1, 1, 32])]

    def test_takes_no_memory_and_saves_what_it_loaded(self, tmp_path: Path) -> None:
        model = small()
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        sparse_decode.switch(model, True)
        down = next(iter(sparse_decode.squared_relus(model).values())).down_proj.weight
        assert down.t().is_contiguous() and down.untyped_storage().nbytes() == down.nbytes
        save_model(model, None, tmp_path / "saved")
        loaded = load_model(tmp_path / "saved", "cpu")
        for found in (model.state_dict(), loaded.state_dict()):
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor)
        model.load_state_dict(expected)
        assert down.t().is_contiguous()

    def test_packed_integers_are_refused_with_the_reason(self) -> None:
        model = small()
        second = sparse_decode.squared_relus(model)[1]
        install(model, {"layers.1.ffn.down_proj": Format(8)})
        assert list(sparse_decode.squared_relus(model)) == [0, 2]
        with pytest.raises(ValueError, match="read whole rows"):
            second.sparse = True


class TestChoose:
    def test_switches_on_where_the_measured_time_is_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small()
        ffns = list(sparse_decode.squared_relus(model).values())

        def seconds(step: partial[torch.Tensor], device: torch.device) -> float:
            return {ffns[0].skip_zeros: 1e-6, ffns[1].skip_zeros: 5e-6}.get(step.func, 3e-6)

        monkeypatch.setattr(sparse_decode, "measure_seconds", seconds)
        choices = sparse_decode.choose(model, list(range(40)))
        # The last layer is as fast either way: it stays as it was.
        assert [choice.on for choice in choices] == [True, False, False]
        assert [ffn.sparse for ffn in ffns] == [True, False, False]
        assert choices[0].sparse_us == pytest.approx(1) and choices[0].dense_us == pytest.approx(3)

    def test_each_product_is_timed_in_its_own_layout_and_layers_take_turns(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = small()
        ffns = list(sparse_decode.squared_relus(model).values())
        timed: list[tuple[str, int]] = []

        def seconds(step: partial[torch.Tensor], device: torch.device) -> float:
            names = {ffn.down_proj: ("dense", number) for number, ffn in enumerate(ffns)}
            names |= {ffn.skip_zeros: ("sparse", number) for number, ffn in enumerate(ffns)}
            kind, number = names[step.func]
            assert all(ffn.down_proj.weight.is_contiguous() == (kind == "dense") for ffn in ffns)
            timed.append((kind, number))
            return 1.0

        monkeypatch.setattr(sparse_decode, "measure_seconds", seconds)
        sparse_decode.switch(model, True)
        sparse_decode.choose(model, list(range(40)), rounds=2)
        assert timed == [(kind, n) for kind in ("dense", "sparse") for _ in range(3 * 8) for n in range(3)]

    def test_sparsity_is_the_share_of_zeros_on_the_given_text(self) -> None:
        model, ids = small(), torch.arange(40)
        (first, *_) = sparse_decode.choose(model, ids, rounds=1)
        ffn = sparse_decode.squared_relus(model)[0]
        ffn.record_sparsity = True
        model(ids[None])
        assert ffn.sparsity is not None and first.sparsity == pytest.approx(float(ffn.sparsity.mean()))
        assert 0.2 < first.sparsity < 0.8

    def test_a_model_without_squared_relu_has_no_choices(self) -> None:
        attention = component("attention", "gqa", num_kv_heads=1)
        model = llama(97, attention=attention, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=64)
        assert sparse_decode.choose(model, [1, 2, 3]) == []

    def test_no_text_is_refused(self) -> None:
        with pytest.raises(ValueError, match="without a text's tokens"):
            sparse_decode.choose(small(), [])
