"""A named pipe in the place of a file is refused with a sentence by whatever reads it: none waits for a writer."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import run, save_small

COMMANDS = (
    "data inspect {pipe}",
    "data inspect {pipe}.jsonl",
    "data prepare {pipe}",
    "data prepare {pipe}.yaml",
    "data inspect rows.jsonl --template {pipe}",
    "data inspect rows.jsonl --tokenizer {pipe}",
    "tokenizer inspect {pipe} x",
    "tokenizer train {pipe} --vocab-size 300 --out out",
    "perplexity model {pipe}",
    "generate {pipe} --prompt x",
    "generate model --prompt x --chat --chat-template {pipe}",
    "eval model --tasks arc_easy --data {pipe}.yaml",
    "eval model --tasks arc_easy --include {pipe}",
    "compare {pipe}.json other.json",
    "card model {pipe}.json",
    "convert {pipe}.gguf out",
    "verify {pipe}.gguf --against model",
    "plan model --device {pipe}.yaml",
    "validate {pipe}.yaml",
    "run demo {pipe}.yaml",
    "run sft init_from={pipe} data=conversations data.paths=[rows.jsonl]",
    "resume {pipe}",
    "runs {pipe}",
    "checkpoints {pipe}",
    "merge {pipe} out",
)
NEEDED = ("config.json", "tokenizer.json", "model.safetensors")
OTHERS = ("tokenizer_config.json", "manifest.json", "chat_template.jinja")  # a pipe is as if they were not there


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model and pipes; a process that waits for one of them is interrupted."""

    def waits(*_: object) -> None:
        raise TimeoutError("it waits for a pipe")

    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "other.json").write_text("{}")
    for suffix in ("", ".jsonl", ".yaml", ".json", ".gguf"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
    before = signal.signal(signal.SIGALRM, waits)
    signal.alarm(60)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_in_the_place_of_an_argument(
    place: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = run(monkeypatch, capsys, *command.format(pipe="pipe").split(), stdin=b"")
    assert code == 2 and "pipe" in said and "Traceback" not in said, said


@pytest.mark.parametrize("name", NEEDED + OTHERS)
def test_in_the_place_of_a_models_file(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "model" / name).unlink(missing_ok=True)
    os.mkfifo(place / "model" / name)
    words = ("generate", "model", "--prompt", "x", "--max-new-tokens", "1")
    code, _, said = run(monkeypatch, capsys, *words, stdin=b"")
    assert "Traceback" not in said and (code == 2 or name in OTHERS), said
