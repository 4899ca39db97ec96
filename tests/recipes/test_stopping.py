"""Stopped, killed, started twice or with something changed: a run goes on exactly, or says why not."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import SMALL, Run, command, environment, kill_at, metrics, refusal, start, weights

from plmtune.errors import UserError


class TestStopping:
    @pytest.mark.parametrize("step", [1, 5, 9])
    def test_killed_and_resumed_ends_byte_identical(self, place: Path, plmtune: Run, step: int) -> None:
        start("run_dir=whole")
        kill_at(place, step, "cut")
        assert json.loads((place / "cut/run.json").read_text())["status"] == "running"
        resumed = plmtune("resume", "cut")
        assert resumed.returncode == 0, resumed.stderr
        # whole ran with this process's threads, cut with one: sums must not depend on it at this size.
        assert metrics(place / "cut") == metrics(place / "whole")
        assert weights(place / "cut") == weights(place / "whole")

    def test_sigterm_finishes_the_step_saves_and_says_so(self, place: Path, plmtune: Run) -> None:
        process = subprocess.Popen(
            command("run", "pretrain", *SMALL, "run_dir=run", "phases=[{name: main, steps: 5000}]",
                    "checkpoint.every=0", "validation.every=0"),
            cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        path = place / "run" / "metrics.jsonl"
        while process.poll() is None and not (path.is_file() and path.stat().st_size > 500):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 75, error
        assert "plmtune resume run" in error
        assert json.loads((place / "run/run.json").read_text())["status"] == "stopped"
        last = metrics(place / "run")[-1]["step"]
        assert (place / f"run/checkpoints/step-{last:08}").is_dir()

    def test_resume_by_the_same_command_finds_the_run(self, place: Path) -> None:
        start("phases=[{name: main, steps: 6}]")
        with pytest.raises(UserError, match="no unfinished run"):
            start("phases=[{name: main, steps: 6}]", "resume=true")
        (done,) = [path for path in (place / "runs/pretrain").iterdir() if not path.is_symlink()]
        record = json.loads((done / "run.json").read_text())
        (done / "run.json").write_text(json.dumps({**record, "status": "running"}))
        start("phases=[{name: main, steps: 6}]", "resume=true")
        assert json.loads((done / "run.json").read_text())["attempts"] == 2

    def test_resume_with_another_config_names_the_key(self, place: Path) -> None:
        start("run_dir=run", "phases=[{name: main, steps: 3}]")
        said = refusal("run_dir=run", "phases=[{name: main, steps: 3}]", "optimizer.lr=0.5", "resume=true")
        assert "optimizer.lr" in said and "0.5" in said and "init_from" in said

    def test_resume_with_other_data_is_refused(self, place: Path) -> None:
        start("run_dir=run", "phases=[{name: main, steps: 3}]")
        (place / "corpus/00.txt").write_text("another text")
        assert "source files has changed" in refusal("run_dir=run", "phases=[{name: main, steps: 3}]", "resume=true")
