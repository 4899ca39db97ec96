"""Runs that start from a checkpoint with a part that it lacks."""

from pathlib import Path
from typing import Any

import pytest
import tuning
from cli_runs import metrics, refusal, start, stop_at, weights
from test_resuming import plmtune

from plmtune.models.hf_config import read_model_config

OWN = ("model=null", "tokenizer=null")
ADDED = ("init_changes.attention.shortcut=augmented", "init_changes.ffn={component: siaf, num_terms: 3}")


def test_pretraining_starts_at_the_checkpoints_loss_and_resumes(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    start("run_dir=plain", f"init_from={whole}", *OWN, "phases=[{name: main, steps: 1}]")
    start("run_dir=added", f"init_from={whole}", *OWN, *ADDED)
    assert metrics(place / "added")[0]["loss"] == metrics(place / "plain")[0]["loss"]
    assert "attention.shortcut=augmented, ffn=siaf: 8 tensors of" in capsys.readouterr().err
    written = read_model_config(next((place / "added/checkpoints").glob("step-*")))
    assert (written["ffn"]["num_terms"], written["ffn"]["base"]) == (3, "squared_relu")
    stop_at(monkeypatch, 5, "run_dir=run", f"init_from={whole}", *OWN, *ADDED)
    plmtune("resume", "run")
    assert weights(place / "run") == weights(place / "added")


def test_fine_tuning_starts_at_the_checkpoints_loss(base: Path, capsys: Any) -> None:
    one_step = "phases=[{name: main, steps: 1}]"
    tuning.run("sft", "run_dir=plain", one_step)
    tuning.run("sft", "run_dir=added", one_step, *ADDED)
    losses = [metrics(base / run)[0]["loss"] for run in ("plain", "added")]
    assert losses[0] == losses[1]
    assert "change nothing until they are trained" in capsys.readouterr().err


def test_adapters_would_leave_the_parts_untrained(base: Path) -> None:
    assert "key peft: adapters are all that is trained" in tuning.refusal("sft", "peft=lora", *ADDED)


def test_changes_need_a_checkpoint_whose_model_they_change(place: Path, whole: Path) -> None:
    assert "there is no model to change" in refusal("model=null", *ADDED)
    assert "model names another one" in refusal(f"init_from={whole}", *ADDED)
