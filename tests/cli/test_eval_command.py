"""plmtune eval, as a person types it: tasks of one's own over local files."""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import run, save_small

from plmtune.evaluation import code_eval, prefixes, results, scoring
from plmtune.models.hf import load_model, save_model

Command = Callable[..., tuple[int, str, str]]

COLOURS = """
task: colours
dataset_path: nobody/colours
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["red", "green", "blue"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
"""
ADDING = """
task: adding
dataset_path: nobody/adding
unsafe_code: true
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with tasks in `mine` and their data in `files`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "colours.yaml").write_text(COLOURS)
    (tmp_path / "mine" / "adding.yaml").write_text(ADDING)
    (tmp_path / "files").mkdir()
    rows = [{"question": f"The colour of number {i} is", "answer": i % 3} for i in range(6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "files" / "rows.jsonl").write_text(text)
    (tmp_path / "files" / "tasks.yaml").write_text("colours: {test: rows.jsonl}\nadding: {test: rows.jsonl}\n")
    return tmp_path


@pytest.fixture
def plmtune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return functools.partial(run, monkeypatch, capsys, "eval", "--include", "mine", "--data", "files")


def result(place: Path) -> dict[str, object]:
    (file,) = (place / "evaluations").glob("*.json")
    return results.load(file)


class TestEval:
    def test_ones_own_task_is_measured_shown_and_written(self, model: Path, place: Path, plmtune: Command) -> None:
        code, out, err = plmtune(model, "--tasks", "colours", "--limit", 5)
        assert code == 0, err
        assert "colours" in out
        assert "acc ↑" in out
        found = result(place)
        assert found["status"] == "complete"
        assert found["tasks"]["colours"]["version"] == 2.0
        assert len(found["samples"]["colours"]) == found["tasks"]["colours"]["samples"] == 5
        assert found["settings"]["limit"] == 5
        assert "files/rows.jsonl" in found["tasks"]["colours"]["data"]
        assert found["model"]["name"] == "tiny"

    def test_several_checkpoints_stand_side_by_side(self, model: Path, place: Path, plmtune: Command) -> None:
        (place / "other").symlink_to(model)
        code, out, _ = plmtune(model, "other", "--tasks", "colours")
        assert code == 0
        assert len(list((place / "evaluations").glob("*.json"))) == 2
        assert out.count("±") == 2

    def test_interrupted_it_goes_on_where_it_was(
        self, model: Path, place: Path, plmtune: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed: list[int] = []
        original = scoring.Scorer.score

        def score(self: scoring.Scorer, *arguments: object) -> object:
            for batch in original(self, *arguments):
                computed.extend(index for index, _ in batch)
                yield batch
                if interrupt:
                    raise KeyboardInterrupt

        monkeypatch.setattr(scoring.Scorer, "score", score)
        monkeypatch.setattr(prefixes, "_BRANCHES", 0)
        interrupt = True
        code, _, err = plmtune(model, "--tasks", "colours", "--batch-size", 1)
        assert code == 130
        assert "the same command resumes it" in err
        assert 0 < len(computed) < 18
        interrupt = False
        assert plmtune(model, "--tasks", "colours", "--batch-size", 1)[0] == 0
        assert sorted(computed) == list(range(18))

    def test_without_a_checkpoint_it_needs_a_finished_run(self, place: Path, plmtune: Command) -> None:
        code, _, err = plmtune("--tasks", "colours")
        assert code == 2
        assert "no finished run under runs/" in err

    def test_a_task_without_data_is_told_of_and_the_others_run(
        self, model: Path, place: Path, plmtune: Command
    ) -> None:
        (place / "mine" / "lost.yaml").write_text(COLOURS.replace("task: colours", "task: lost"))
        (place / "files" / "tasks.yaml").write_text("colours: {test: rows.jsonl}\nlost: {test: away.jsonl}\n")
        code, out, err = plmtune(model, "--tasks", "lost,colours")
        assert code == 2
        assert "away.jsonl" in err
        assert "not measured, for the reasons above: lost" in err
        assert "acc ↑" in out
        assert list(result(place)["failed"]) == ["lost"]

    def test_weights_that_are_no_numbers_end_a_task_in_words(
        self, model: Path, place: Path, plmtune: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("plmtune.io.safetensors_writer.not_finite", lambda named: [])  # which would not write them
        shutil.copytree(model, place / "broken")
        made = load_model(model)
        with torch.no_grad():
            made.norm.weight.fill_(float("nan"))
        save_model(made, None, place / "broken")
        code, _, err = plmtune("broken", "--tasks", "colours")
        assert code == 2
        assert "colours, document 0" in err
        assert "NaN" in err

    def test_a_task_whose_code_fails_is_told_of_with_its_place_and_the_others_run(
        self, model: Path, place: Path, plmtune: Command
    ) -> None:
        fails = COLOURS.replace("task: colours", "task: fails").replace(
            "metric_list:", "process_results: !function mine.judge\nmetric_list:"
        )
        (place / "mine" / "fails.yaml").write_text(fails)
        (place / "mine" / "mine.py").write_text("def judge(doc, results):\n    return {'acc': [][0]}\n")
        (place / "files" / "tasks.yaml").write_text("colours: {test: rows.jsonl}\nfails: {test: rows.jsonl}\n")
        code, out, err = plmtune(model, "--tasks", "fails,colours")
        assert code == 2
        assert "fails: IndexError: list index out of range" in err
        assert "mine.py, line 2" in err
        assert "acc ↑" in out
        assert list(result(place)["tasks"]) == ["colours"]

    def test_fewer_documents_than_processes_are_refused_by_all_alike(
        self, model: Path, place: Path, plmtune: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("plmtune.training.distributed.world_size", lambda: 4)
        code, _, err = plmtune(model, "--tasks", "colours", "--limit", 3)
        assert code == 2
        assert "colours: 3 documents cannot be shared by 4 processes" in err

    def test_prompts_longer_than_the_model_are_counted(self, model: Path, place: Path, plmtune: Command) -> None:
        rows = [{"question": "long " * 40, "answer": 0}] * 2
        (place / "files" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, _, err = plmtune(model, "--tasks", "colours")
        assert code == 0
        assert "colours: 6 requests were longer than the model's context and lost their beginning" in err
        assert result(place)["tasks"]["colours"]["truncated"] == 6

    @pytest.mark.slow  # five documents, so that one rank has fewer and lm-eval pads its requests
    def test_two_processes_share_the_documents(self, model: Path, place: Path, plmtune: Command) -> None:
        options = ["eval", "--include", "mine", "--data", "files", str(model), "--tasks", "colours", "--limit", "5"]
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "plmtune",
        ]
        done = subprocess.run(
            [*torchrun, *options, "--out", "two"], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        assert plmtune(*options[5:])[0] == 0
        (file,) = (place / "two").glob("*.json")
        shared, alone = results.load(file), result(place)
        assert shared["tasks"]["colours"]["metrics"] == alone["tasks"]["colours"]["metrics"]
        shared, alone = shared["samples"]["colours"], alone["samples"]["colours"]
        assert [row["doc_hash"] for row in shared] == [row["doc_hash"] for row in alone]
        assert [row["metrics"] for row in shared] == [row["metrics"] for row in alone]


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--tasks", "colour"), "There is no task colour. Did you mean colours"),
            ((), "Name what to measure"),
            (("--suite", "quik"), "--suite quik"),
            (("--tasks", "colours", "--batch-size", "many"), "--batch-size many"),
            (("--tasks", "colours", "--system", "Be brief."), "Add --chat"),
            (("--tasks", "colours", "--chat"), "has no chat template"),
            (
                ("--tasks", "colours", "--max-new-tokens", 100_000),
                "--max-new-tokens 100,000 must be below the context of",
            ),
            (("--tasks", "adding"), "adding runs code that the model writes: add --unsafe-code"),
        ],
    )
    def test_are_sentences(
        self, model: Path, place: Path, plmtune: Command, options: tuple[str, ...], said: str
    ) -> None:
        code, _, err = plmtune(model, *options)
        assert code == 2
        assert said in err
        assert not (place / "evaluations").exists()

    def test_without_a_sandbox_code_is_not_run(
        self, model: Path, place: Path, plmtune: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(code_eval, "missing", lambda: "namespaces are not allowed")
        code, _, err = plmtune(model, "--tasks", "adding", "--unsafe-code")
        assert code == 2
        assert "there is no sandbox on this machine: namespaces are not allowed" in err


class TestList:
    def test_names_that_contain_a_word(self, place: Path, plmtune: Command) -> None:
        code, out, _ = plmtune("--list", "colour")
        assert code == 0
        assert any(line.startswith("colours\ttask\tmultiple_choice") for line in out.splitlines())
        assert "\ngsm8k\t" not in out
