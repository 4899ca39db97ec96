"""Listing what a run has saved: whole, damaged, newest, best."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plmtune.cli import cli
from plmtune.errors import UserError
from plmtune.io import manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints, the second of them the best."""
    for step, loss in ((5, 2.0), (10, 1.5), (100, 1.75)):
        directory = tmp_path / f"run/checkpoints/step-{step:08}"
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(bytes(step) * 1000)
        (directory / "state.json").write_text(json.dumps({"step": step, "metrics": {"validation_loss": loss}}))
        manifest.write(directory, step, {})
    (tmp_path / "run/checkpoints/latest").write_text("step-00000100\n")
    (tmp_path / "run/checkpoints/best").write_text("step-00000010\n")
    return tmp_path / "run"


def listed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[list[str]]:
    """The rows of the table, by cell, without the time of saving."""
    cli.main(["checkpoints", *map(str, arguments)], standalone_mode=False)
    return rows(capsys)


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    found = [line.split("  ") for line in capsys.readouterr().out.splitlines()[1:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in found]
    return [[cell for cell in row if ":" not in cell] for row in cells if len(row) > 1]


class TestTable:
    def test_says_of_each_what_it_is(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        expected = [
            ["5", "4.93 KiB", "3", "2.0000", "whole"],
            ["10", "9.81 KiB", "3", "1.5000", "whole, best"],
            ["100", "97.71 KiB", "3", "1.7500", "whole, latest"],
        ]
        assert listed(capsys, run) == expected
        assert listed(capsys, run / "checkpoints") == expected
        assert listed(capsys, run / "checkpoints/step-00000010") == [expected[1]]

    def test_one_that_is_damaged_is_named_and_the_others_still_listed(
        self, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = run / "checkpoints/step-00000010/model.safetensors"
        path.write_bytes(b"\1" + path.read_bytes()[1:])
        assert [row[-1] for row in listed(capsys, run, "--quick")] == [
            "sizes match", "sizes match, best", "sizes match, latest",
        ]  # fmt: skip
        with pytest.raises(UserError, match=r"1 of 3 checkpoints damaged\. Resume takes the newest of the other 2\."):
            listed(capsys, run)
        out = capsys.readouterr().out
        assert [line.rstrip().rpartition("  ")[2] for line in out.splitlines()[1:4]] == [
            "whole", "damaged, best", "whole, latest",
        ]  # fmt: skip
        assert f"{path} is damaged: xxh3" in out
        path.write_bytes(b"short")
        with pytest.raises(UserError, match="1 of 3"):
            listed(capsys, run, "--quick")

    def test_a_lost_manifest_and_a_broken_state_are_no_crash(
        self, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (run / "checkpoints/step-00000005/manifest.json").unlink()
        (run / "checkpoints/step-00000010/state.json").write_text("[]")
        (run / "checkpoints/step-00000100/manifest.json").write_bytes(b"\xff")
        (run / "checkpoints/latest").write_bytes(b"\xff")
        with pytest.raises(UserError, match=r"3 of 3 checkpoints damaged\. No other is left to resume from"):
            listed(capsys, run)
        out = capsys.readouterr().out
        assert "step-00000005" in out and "has no manifest.json" in out

    def test_where_there_are_none_it_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no checkpoints"):
            cli.main(["checkpoints", str(tmp_path)], standalone_mode=False)


def test_as_a_command_it_exits_with_two_if_one_is_damaged_and_needs_no_torch(run: Path) -> None:
    (run / "checkpoints/step-00000100/state.json").unlink()
    code = (
        "import sys; from plmtune.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "checkpoints", run], capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "40"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "validation loss" in done.stdout and "damaged, latest" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stderr.strip().endswith("1 of 3 checkpoints damaged. Resume takes the newest of the other 2.")
