"""Where no model is named, a command reads that of the newest finished run, and says which."""

import json
import shutil
from pathlib import Path

import pytest
from in_process import run, save_small

from plmtune.config import compose, typed_config
from plmtune.io import manifest

NEWEST = "runs/sft/20260102-000000"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, a newer one that was stopped, and text."""
    place = tmp_path_factory.mktemp("made")
    for name, status in (("pretrain/20260101", "finished"), ("sft/20260102", "finished"), ("sft/20260103", "stopped")):
        directory = place / f"runs/{name}-000000"
        save_small(directory / "checkpoints/step-00000001")
        (directory / "checkpoints/step-00000001/state.json").write_text("{}")
        manifest.write(directory / "checkpoints/step-00000001", 1, {})
        (directory / "config.yaml").write_text(
            typed_config.to_yaml(compose.compose("pretrain", (), ["model=plm_tiny"]))
        )
        (directory / "run.json").write_text(json.dumps({"status": status, "ended": name[-8:]}))
    (place / "texts").mkdir()
    (place / "texts/book.txt").write_text("The quick brown fox. " * 9)
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = [
    ("generate --prompt x --max-new-tokens 2", "generate CHECKPOINT --prompt TEXT"),
    ("chat --chat-template plain --max-new-tokens 2", "chat CHECKPOINT"),
    ("perplexity texts/book.txt", "perplexity CHECKPOINT FILE"),
    ("perplexity texts", "perplexity CHECKPOINT FILE"),
    ("perplexity texts/*.txt", "perplexity CHECKPOINT FILE"),
    ("card --out card.md", "card CHECKPOINT [RESULT]"),
    ("export --to gguf --no-verify", "export CHECKPOINT --to FORM"),
    ("checkpoints", "checkpoints RUN"),
    ("bench --contexts 8 --new-tokens 1", "bench TARGET"),
    ("eval --tasks arc_easy", "eval CHECKPOINT"),
]


@pytest.mark.parametrize(("command", "other"), COMMANDS, ids=lambda value: value)
def test_is_read_and_named(
    place: Path, command: str, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("plmtune.io.hub.unavailable_reason", lambda: "no hub is asked in tests")
    monkeypatch.setattr("plmtune.devices.measure.read_bandwidth", lambda device: 1.0)
    monkeypatch.setattr("plmtune.devices.measure.measure", lambda target, **_: [])
    code, _, said = run(monkeypatch, capsys, *command.split(), stdin=b"hi\n")
    said = " ".join(said.split())
    assert f"model: {NEWEST}, the newest finished run (for another: plmtune {other}" in said, said
    assert code == 0 or "arc_easy, allenai/ai2_arc (ARC-Easy), cannot be read" in said, said


@pytest.mark.parametrize(("command", "other"), COMMANDS, ids=lambda value: value)
def test_without_any_it_is_said_how_to_name_a_model(
    place: Path, command: str, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("runs")
    code, _, said = run(monkeypatch, capsys, *command.split())
    assert code == 2
    assert "There is no finished run under runs/" in " ".join(said.split()) and other in " ".join(said.split())


@pytest.mark.parametrize(
    "words",
    [["runs/pretrain/20260101-000000"], ["runs/pretrain/20260101-000000/checkpoints"], ["runs/pretrain"], ["nowhere"]],
)
def test_what_is_a_model_or_may_be_meant_as_one_is_not_taken_for_a_text(
    place: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "runs/pretrain/latest").symlink_to("20260101-000000")
    _, _, said = run(monkeypatch, capsys, "perplexity", *words, "texts")
    assert "the newest finished run" not in said


def test_a_model_without_a_text_asks_for_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = run(monkeypatch, capsys, "perplexity", NEWEST)
    assert (code, "Name the text to measure: plmtune perplexity runs/sft/20260102-000000 FILE" in said) == (2, True)


def test_results_are_those_of_the_folder_that_eval_writes(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = run(monkeypatch, capsys, "compare")
    assert (code, "There is no folder evaluations/ here." in said) == (2, True)
    (place / "evaluations").mkdir()
    code, _, said = run(monkeypatch, capsys, "compare")
    assert code == 2 and "results: those in evaluations/" in said
