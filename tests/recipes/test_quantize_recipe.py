"""The recipe quantize: a directory that loads like any other, told how large it is and what it lost."""

import json
from pathlib import Path

import pytest
import torch
from plmtune.recipes import quantize

import plmtune
from plmtune import config
from plmtune.data.tokenizers import bundled
from plmtune.errors import UserError
from plmtune.models.hf import save_model
from plmtune.models.plm import plm
from plmtune.modules.quantized import Quantized
from plmtune.registry import component

TEXT = "The quick brown fox jumps over the lazy dog. " * 80


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model, and text of some thousand tokens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLMTUNE_KERNELS", "reference")
    torch.manual_seed(0)
    tokenizer = bundled()
    model = plm(
        tokenizer.vocab_size,
        attention=component(
            "attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
        ),
        ffn=component("ffn", "squared_relu", hidden_dim=64),
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        max_seq_len=64,
        init_std=0.15,
    )
    save_model(model, None, tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(*overrides: str) -> float | None:
    own = ["checkpoint=base", "data=files", "data.paths=[text.txt]", "calibration_tokens=256", "test_tokens=256"]
    return quantize.main(config.compose("quantize", (), [*own, "seq_len=32", "run_dir=out", *overrides]))


class TestOneModel:
    def test_the_directory_loads_like_any_other_and_says_what_it_lost(self, folder: Path) -> None:
        loss = run("quantization=int4")
        report = json.loads((folder / "out" / "quantize.json").read_text())
        assert report["loss"] == loss
        assert report["bytes"] < report["bytes_before"]
        assert report["formats"]["layers.0.ffn.up_proj"] == "int4_g32"
        model, tokenizer = plmtune.load(folder / "out", "cpu")
        assert isinstance(model.get_submodule("layers.1.ffn.down_proj"), Quantized)
        assert model(torch.tensor([tokenizer.encode("The quick")])).isfinite().all()

    def test_8_bits_lose_less_than_4(self, folder: Path) -> None:
        eight, four = run("quantization=int8", "run_dir=eight"), run("quantization=int4", "run_dir=four")
        before = json.loads((folder / "four" / "quantize.json").read_text())["loss_before"]
        assert eight is not None and four is not None
        assert abs(eight - before) < abs(four - before)

    def test_a_rule_leaves_a_module_as_it_is(self, folder: Path) -> None:
        (folder / "mine.yaml").write_text('# rules\nquantization: {rules: {"*.down_proj": keep}}\n')
        own = ["quantization=int8", "checkpoint=base", "run_dir=out", "calibration_tokens=0", "test_tokens=0"]
        quantize.main(config.compose("quantize", ["mine.yaml"], own))
        model, _ = plmtune.load(folder / "out", "cpu")
        assert isinstance(model.get_submodule("layers.0.ffn.down_proj"), torch.nn.Linear)
        assert isinstance(model.get_submodule("layers.0.ffn.up_proj"), Quantized)


class TestSensitivity:
    def test_a_budget_gives_a_mix_that_fits_it(self, folder: Path) -> None:
        run("quantization=int4", "sensitivity.measure=true", "sensitivity.budget=52%", "sensitivity.tokens=64")
        report = json.loads((folder / "out" / "quantize.json").read_text())
        assert report["scheme"]["component"] == "mixed"
        assert report["bytes"] - 4096 <= 0.52 * report["bytes_before"]  # the file has a header
        assert len(set(report["formats"].values())) > 1
        assert (folder / "out" / "sensitivity.png").stat().st_size > 10_000
        # What it proposes is a config that can be given again.
        again = config.compose("quantize", ["out/mix.yaml"], [])
        assert again.quantization.name == "mixed"

    def test_a_budget_below_the_smallest_scheme_is_refused_before_anything_is_read(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"sensitivity.budget: 5% is .* the scheme int4 alone takes"):
            run("quantization=int4", "sensitivity.measure=true", "sensitivity.budget=5%")
        assert not (folder / "out").exists()


class TestMistakes:
    def test_nothing_to_quantize(self, folder: Path) -> None:
        with pytest.raises(UserError, match="no finished run under runs/ to quantize"):
            run("checkpoint=null")

    def test_a_quantized_model_is_not_quantized_again(self, folder: Path) -> None:
        run("quantization=int8")
        with pytest.raises(UserError, match="quantized already"):
            run("checkpoint=out", "run_dir=twice")
        assert not (folder / "twice").exists()

    def test_too_little_text(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"key data: the text has [\d,]+ tokens"):
            run("test_tokens=1000000")
        with pytest.raises(UserError, match="calibration_tokens: must be at least 0"):
            run("calibration_tokens=-1")

    def test_a_group_that_is_none(self, folder: Path) -> None:
        with pytest.raises(UserError, match="group_size must be a multiple of 16, not 20"):
            run("quantization=int4", "quantization.group_size=20")

    def test_a_directory_in_use_is_not_overwritten(self, folder: Path) -> None:
        run("quantization=int8")
        with pytest.raises(UserError, match="already holds a run"):
            run("quantization=int4")
