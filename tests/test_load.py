"""plmtune.load: a model and its tokenizer from any directory that has them."""

from pathlib import Path

import pytest
import torch

import plmtune
from plmtune.errors import UserError
from plmtune.models.hf import save_model
from plmtune.models.plm import plm
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte


def save(directory: Path, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    tokenizer = byte()
    model = plm(
        tokenizer.vocab_size,
        attention=component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        ffn=component("ffn", "squared_relu", hidden_dim=32),
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        max_seq_len=32,
    )
    save_model(model, None, directory)
    tokenizer.save(directory)
    return model.head_weight


class TestLoad:
    def test_gives_a_model_and_a_tokenizer_that_fit(self, tmp_path: Path) -> None:
        weight = save(tmp_path)
        model, tokenizer = plmtune.load(tmp_path, "cpu")
        assert torch.equal(model.head_weight, weight)
        assert not model.training
        ids = torch.tensor([tokenizer.encode("hello")])
        assert model(ids).shape == (1, 5, tokenizer.vocab_size)

    def test_takes_a_dtype(self, tmp_path: Path) -> None:
        save(tmp_path)
        assert plmtune.load(str(tmp_path), "cpu", torch.bfloat16)[0].head_weight.dtype == torch.bfloat16

    def test_a_run_means_what_latest_names(self, tmp_path: Path) -> None:
        weights = [save(tmp_path / "checkpoints" / f"step-0000000{i}", seed=i) for i in range(3)]
        (tmp_path / "checkpoints" / "latest").write_text("step-00000001\n")
        assert torch.equal(plmtune.load(tmp_path, "cpu")[0].head_weight, weights[1])

    @pytest.mark.parametrize("latest", [None, "step-00000077", "../../elsewhere", ""])
    def test_a_run_without_a_good_latest_means_its_highest_step(self, tmp_path: Path, latest: str | None) -> None:
        save(tmp_path / "elsewhere", seed=9)
        run = tmp_path / "run"
        weights = [save(run / "checkpoints" / f"step-{i:08d}", seed=i) for i in (2, 10)]
        if latest is not None:
            (run / "checkpoints" / "latest").write_text(latest)
        assert torch.equal(plmtune.load(run, "cpu")[0].head_weight, weights[1])

    def test_nothing_to_load_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"There is no .*none \(seen from .*\)\. Give a checkpoint"):
            plmtune.load(tmp_path / "none")
        with pytest.raises(UserError, match=r"holds neither config\.json nor checkpoints"):
            plmtune.load(tmp_path)
