"""Runs that learn from a teacher: what they log, that they resume, and what they refuse."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from cli_runs import metrics, nothing_beside, refusal, start, stop_at, weights
from group import in_group
from test_resuming import plmtune

DISTIL = ("loss=forward_kl", "loss.temperature=2", "loss.cross_entropy_weight=0.25")


def logged(run: Path) -> list[dict[str, Any]]:
    return [entry for entry in metrics(run) if "loss" in entry]


def test_cross_entropy_and_divergence_are_logged_apart(place: Path, whole: Path) -> None:
    start("run_dir=run", *DISTIL, f"distillation.teacher={whole}")
    for entry in logged(place / "run"):
        expected = 0.25 * entry["cross_entropy"] + 0.75 * 4 * entry["divergence"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    # The teacher has the student's initial weights, trained by 12 steps.
    first, *_, last = logged(place / "run")
    assert last["divergence"] < first["divergence"]
    measured = [entry for entry in metrics(place / "run") if "validation_loss" in entry]
    assert measured[-1]["validation_loss"] < measured[0]["validation_loss"]


def test_a_model_that_starts_as_its_teacher_has_no_divergence(place: Path, whole: Path) -> None:
    start("run_dir=run", *DISTIL, f"distillation.teacher={whole}", f"init_from={whole}")
    assert abs(logged(place / "run")[0]["divergence"]) < 1e-5


def test_a_stopped_run_resumes_to_the_same_weights(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (*DISTIL, f"distillation.teacher={whole}")
    start("run_dir=undisturbed", *keys)
    stop_at(monkeypatch, 5, "run_dir=run", *keys)
    plmtune("resume", "run")
    assert weights(place / "run") == weights(place / "undisturbed")
    assert metrics(place / "run") == metrics(place / "undisturbed")


def distil_by_each_strategy(place: Path) -> dict[str, Any]:
    with contextlib.chdir(place), nothing_beside():
        for strategy in ("ddp", "fsdp"):
            start(f"run_dir={strategy}", *DISTIL, "distillation.teacher=teacher", f"runtime.strategy={strategy}")
    return {}


def test_two_processes_compute_the_losses_of_one(place: Path, whole: Path) -> None:
    (place / "teacher").symlink_to(whole)
    start("run_dir=one", *DISTIL, "distillation.teacher=teacher")
    in_group(distil_by_each_strategy, 2, place)
    for strategy in ("ddp", "fsdp"):
        for alone, shared in zip(logged(place / "one"), logged(place / strategy), strict=True):
            for key in ("loss", "cross_entropy", "divergence"):
                assert shared[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-7)


class TestBadInput:
    def test_a_loss_without_its_teacher(self, place: Path) -> None:
        assert "distillation.teacher=DIR" in refusal("loss=reverse_kl")

    def test_a_teacher_that_the_loss_does_not_read(self, place: Path, whole: Path) -> None:
        said = refusal(f"distillation.teacher={whole}")
        assert "cross_entropy has no teacher" in said and "loss=jsd" in said

    def test_a_teacher_of_another_tokenizer(self, place: Path, whole: Path) -> None:
        said = refusal(*DISTIL, f"distillation.teacher={whole}", "tokenizer=bundled")
        assert "its tokenizer differs" in said and "tokenizer=file" in said

    def test_rows_longer_than_the_teacher_reads(self, place: Path, whole: Path) -> None:
        said = refusal(*DISTIL, f"distillation.teacher={whole}", "seq_len=600", "model.max_seq_len=600")
        assert "512 tokens at once" in said

    def test_a_teacher_that_is_not_there(self, place: Path) -> None:
        assert "nowhere" in refusal(*DISTIL, "distillation.teacher=nowhere")
