"""Tasks of lm-eval that are measured while a model is trained."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from cli_runs import metrics, refusal, start, stop_at, weights
from tuning import run, stop_in

from plmtune.evaluation import prefixes, results, scoring
from plmtune.io.metrics import MetricsFile

TASKS = ["eval.tasks=[arc_easy]", "eval.data=map.yaml", "eval.every=4", "eval.limit=3"]
SHORT = [*TASKS[:2], "eval.every=2", "eval.limit=3", "phases=[{name: main, steps: 6}]"]


@pytest.fixture
def questions(place: Path) -> Path:
    write_questions(place)
    return place


def write_questions(place: Path) -> None:
    rows = [
        {"question": f"Which is {word}?", "choices": {"text": [word, "none"], "label": ["A", "B"]}, "answerKey": key}
        for word, key in (("warm", "A"), ("cold", "B"), ("soft", "A"), ("hard", "B"))
    ]
    (place / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "map.yaml").write_text("arc_easy: {test: arc.jsonl}\n")


def scored(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["eval/arc_easy/acc"] for entry in metrics(run) if "eval/arc_easy/acc" in entry}


class TestTasksInTraining:
    def test_they_are_measured_every_so_often_and_at_the_end_and_change_nothing_else(
        self, questions: Path, whole: Path
    ) -> None:
        start("run_dir=run", *TASKS[:2], "eval.every=8", "eval.limit=3")
        assert list(scored(questions / "run")) == [8, 12]
        assert weights(questions / "run") == weights(whole)
        without = [entry for entry in metrics(questions / "run") if "eval/arc_easy/acc" not in entry]
        assert without == metrics(whole)
        file = results.load(questions / "run" / "evaluations" / "step-00000012.json")
        assert file["status"] == "complete"
        assert file["tasks"]["arc_easy"]["samples"] == 3
        assert not (questions / "run" / "evaluations" / "pending").exists()

    def test_a_run_stopped_in_them_resumes_with_them_and_computes_nothing_twice(
        self, questions: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed: list[int] = []
        original = scoring.Scorer.score

        def score(self: scoring.Scorer, items: list[scoring.Item], known: set[int]) -> object:
            for batch in original(self, items, known):
                computed.extend(index for index, _ in batch)
                yield batch

        monkeypatch.setattr(scoring.Scorer, "score", score)
        # One answer a batch, so that there is a middle to stop in.
        monkeypatch.setattr(prefixes, "_BRANCHES", 0)
        small = [*SHORT, "eval.batch_size=1"]
        with monkeypatch.context() as patch:
            stop_in(patch, scoring.Scorer, "_compute", 2)
            with pytest.raises(SystemExit) as stopped:
                start("run_dir=run", *small)
        assert stopped.value.code == 75
        assert 0 < len(computed) < 6
        assert list(scored(questions / "run")) == []
        start("run_dir=run", "resume=true", *small)
        assert sorted(computed) == sorted([*range(6)] * 3)
        start("run_dir=whole", *small)
        assert scored(questions / "run") == scored(questions / "whole")

    def test_a_run_stopped_elsewhere_measures_no_step_again(
        self, questions: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, 2, "run_dir=run", *SHORT)
        start("run_dir=run", "resume=true", *SHORT)
        steps = [entry["step"] for entry in metrics(questions / "run") if "eval/arc_easy/acc" in entry]
        assert steps == [2, 4, 6]

    def test_a_run_stopped_in_its_last_ones_still_gives_its_loss(
        self, questions: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        last = ["run_dir=run", *TASKS[:2], "eval.limit=3"]
        with monkeypatch.context() as patch:
            stop_in(patch, scoring.Scorer, "_compute", 1)
            with pytest.raises(SystemExit):
                start(*last)
        (loss,) = [entry["validation_loss"] for entry in metrics(questions / "run")[-1:]]
        shutil.copytree(questions / "run", questions / "copy")
        assert start(*last, "resume=true") == loss
        assert list(scored(questions / "run")) == [12]

        def full(*given: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(MetricsFile, "append", full)
        said = refusal("run_dir=copy", *last[1:], "resume=true")
        assert "copy/metrics.jsonl cannot be written: No space left on device" in said

    def test_every_recipe_has_them(self, base: Path) -> None:
        write_questions(base)
        for name, budget in (("sft", ["phases=[{name: main, steps: 1}]"]), ("dpo", [])):
            run(name, f"run_dir={name}", *TASKS[:2], "eval.limit=2", "eval.chat=true", *budget)
            assert len(scored(base / name)) == 1

    def test_what_cannot_be_measured_is_said_before_the_run_begins(self, questions: Path) -> None:
        said = refusal("run_dir=run", "eval.tasks=[arc_esay]")
        assert said.startswith("key eval.tasks: There is no task arc_esay. Did you mean")
        assert "key eval.limit: must be at least 0, not -1" in refusal(*TASKS[:2], "eval.limit=-1")
        (questions / "arc.jsonl").unlink()
        assert "arc.jsonl" in refusal("run_dir=run", *TASKS)
        assert "chat template" in refusal("run_dir=run", "eval.tasks=[arc_easy]", "eval.chat=true")
        assert not (questions / "run").exists()

    def test_code_of_the_model_is_not_run_unless_the_config_says_so(self, questions: Path) -> None:
        assert "unsafe_code" in refusal("run_dir=run", "eval.tasks=[humaneval]")
