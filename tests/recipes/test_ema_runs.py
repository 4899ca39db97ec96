"""Runs that average their weights."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import metrics, nothing_beside, start, stop_at
from group import in_group
from safetensors.torch import load_file
from test_resuming import plmtune

from plmtune.errors import UserError
from plmtune.models.hf import load_model
from plmtune.training.effective_dimension import EffectiveDimension


def averages(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step-00000012/ema.safetensors")


def model_of(run: Path) -> bytes:
    return (run / "checkpoints/step-00000012/model.safetensors").read_bytes()


def test_a_run_trains_as_without_and_keeps_and_measures_the_average(place: Path, whole: Path) -> None:
    start("run_dir=run", "ema.decay=0.9", "checkpoint.best=ema_validation_loss")
    assert model_of(place / "run") == model_of(whole)
    measured = [entry for entry in metrics(place / "run") if "validation_loss" in entry]
    assert all(entry["ema_validation_loss"] != entry["validation_loss"] for entry in measured)
    plmtune("merge", "run", "averaged", "--ema")
    state = load_model(place / "averaged").state_dict()
    found = averages(place / "run")
    assert torch.equal(state["tok_embeddings.weight"], found["model.embed_tokens.weight"])
    with pytest.raises(UserError, match="has no averaged weights"):
        plmtune("merge", str(whole), "other", "--ema")


def test_effective_dimensions_are_those_of_the_weights_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[bool] = []

    def counted(model: Any, **given: bool) -> EffectiveDimension:
        wanted.append(given["wanted"])
        return EffectiveDimension(model, **given)

    monkeypatch.setattr("plmtune.recipes.pretrain.EffectiveDimension", counted)
    start("run_dir=run", "ema.decay=0.9", "validation.effective_dimension=true")
    measured = [entry for entry in metrics(place / "run") if "ema_validation_loss" in entry]
    assert wanted == [True, False] * len(measured) and "effective_dimension/0" in measured[0]


def test_a_stopped_run_resumes_to_the_same_average(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start("run_dir=undisturbed", "ema.decay=0.9")
    stop_at(monkeypatch, 5, "run_dir=run", "ema.decay=0.9")
    plmtune("resume", "run")
    ours, theirs = averages(place / "run"), averages(place / "undisturbed")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(place / "run") == metrics(place / "undisturbed")


def average_sharded(place: Path) -> dict[str, Any]:
    with contextlib.chdir(place), nothing_beside():
        start("run_dir=fsdp", "ema.decay=0.9", "runtime.strategy=fsdp")
    return {}


def test_sharded_averages_are_those_of_one_process(place: Path) -> None:
    start("run_dir=one", "ema.decay=0.9")
    in_group(average_sharded, 2, place)
    ours, theirs = averages(place / "fsdp"), averages(place / "one")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    for shared, alone in zip(metrics(place / "fsdp"), metrics(place / "one"), strict=True):
        for key in {"loss", "validation_loss", "ema_validation_loss"} & alone.keys():
            assert shared[key] == pytest.approx(alone[key], rel=1e-5)
