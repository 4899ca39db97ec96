"""plmtune verify: a table, a report as JSON, and exit code 1 for what is not the model."""

import json
from pathlib import Path

import pytest
from in_process import run, save_small

from plmtune.export.gguf_writer import write_gguf
from plmtune.models.hf import load_model
from plmtune.tokenizers.tokenizer_files import byte


def test_a_right_export_passes_and_a_broken_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_small(tmp_path / "checkpoint")
    model, words = load_model(checkpoint), ("--positions", 4, "--runtime", "xllamacpp", "--threads", 1)
    write_gguf(model, byte(), tmp_path / "right.gguf", kind="F32")
    model.norm.weight.data *= 2
    write_gguf(model, byte(), tmp_path / "wrong.gguf", kind="F32")

    against = ("--against", checkpoint, *words)
    report = tmp_path / "report.json"
    code, out, _ = run(monkeypatch, capsys, "verify", tmp_path / "right.gguf", *against, "--json", report)
    assert (code, "FAILED" in out) == (0, False)
    assert "KL from the export's own numbers" in out
    data = json.loads(report.read_text())
    assert data["passed"] is True
    assert {check["name"] for check in data["checks"]} >= {"settings: that differ", "cost: perplexity"}

    code, out, err = run(monkeypatch, capsys, "verify", tmp_path / "wrong.gguf", *against)
    assert (code, "FAILED" in out) == (1, True)
    assert "norm.weight: it is 2 times the checkpoint's" in err.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.gguf",), "There is no nowhere.gguf"),
        (("nowhere.gguf", "--text", "lost.txt"), "lost.txt cannot be read: No such file or directory"),
    ],
)
def test_what_is_not_there_is_said(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, "verify", *words, "--against", save_small(tmp_path / "checkpoint"))
    assert (code, message in err) == (2, True), err
