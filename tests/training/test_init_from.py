"""What a run starts from where nothing is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from plmtune.config import compose, typed_config
from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.models.hf import save_model
from plmtune.tokenizers.tokenizer_files import bundled
from plmtune.training.init_from import choose_init_checkpoint


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a finished pretraining of plm_tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cfg = compose.compose("pretrain", (), ["model=plm_tiny"])
    with torch.random.fork_rng():
        model = cfg.model(vocab_size=bundled().vocab_size)
    run = tmp_path / "runs" / "pretrain" / "20260101-000000"
    step = manifest.step_path(run / "checkpoints", 5)
    save_model(model, None, step)
    bundled().save(step)
    manifest.write(step, 5, {path.name: _entry(path) for path in step.iterdir()})
    (run / "config.yaml").write_text(typed_config.to_yaml(cfg))
    (run / "run.json").write_text(json.dumps({"status": "finished"}))
    return tmp_path / "runs"


def _entry(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "xxh3_128": manifest.digest(path)}


def copy(runs: Path, name: str, recipe: str = "pretrain", status: str = "finished", preset: str = "plm_tiny") -> None:
    """Another run with the same weights, whose config tells something else."""
    target = runs / name
    shutil.copytree(runs / "pretrain" / "20260101-000000", target)
    overrides = [f"model={preset}", *(["tokenizer=bundled"] if recipe != "pretrain" else [])]
    named = {"pretrain": "pretrain", "sft": "sft", "preference": "dpo"}[recipe]
    (target / "config.yaml").write_text(typed_config.to_yaml(compose.compose(named, (), overrides)))
    (target / "run.json").write_text(json.dumps({"status": status}))


class TestChooseInitCheckpoint:
    def test_model_and_tokenizer_are_taken_over(self, runs: Path) -> None:
        cfg = compose.compose("sft")
        said = choose_init_checkpoint(cfg)
        assert cfg.init_from == "runs/pretrain/20260101-000000"
        assert "starting from runs/pretrain/20260101-000000, the newest finished pretrain run" in said
        assert cfg.model.settings["embed_dim"] == 64
        assert cfg.tokenizer.settings["path"].endswith("step-00000005")

    def test_the_newest_finished_run_counts(self, runs: Path) -> None:
        copy(runs, "other/20260103-000000")
        copy(runs, "pretrain/20260102-000000")
        copy(runs, "pretrain/20260104-000000", status="stopped")
        cfg = compose.compose("sft")
        choose_init_checkpoint(cfg)
        assert cfg.init_from == "runs/other/20260103-000000"

    def test_preference_training_starts_from_an_sft_run_if_there_is_one(self, runs: Path) -> None:
        cfg = compose.compose("aries")
        choose_init_checkpoint(cfg)
        assert cfg.init_from == "runs/pretrain/20260101-000000"
        copy(runs, "sft/20250101-000000", recipe="sft")
        copy(runs, "dpo/20260105-000000", recipe="preference")
        cfg = compose.compose("aries")
        choose_init_checkpoint(cfg)
        assert cfg.init_from == "runs/sft/20250101-000000"  # older, and of the fitting kind

    def test_a_named_model_must_be_the_runs(self, runs: Path) -> None:
        copy(runs, "pretrain/20260102-000000", preset="plm_demo")
        cfg = compose.compose("sft", (), ["model=plm_tiny"])
        choose_init_checkpoint(cfg)
        assert cfg.init_from == "runs/pretrain/20260101-000000"
        with pytest.raises(UserError, match=r"no finished pretrain run with this model \(plm\)"):
            choose_init_checkpoint(compose.compose("sft", (), ["model=plm_20m"]))

    def test_what_is_named_is_taken(self, runs: Path) -> None:
        cfg = compose.compose("sft", (), ["init_from=runs/pretrain/20260101-000000/checkpoints/step-00000005"])
        assert choose_init_checkpoint(cfg) == "starting from runs/pretrain/20260101-000000/checkpoints/step-00000005"
