"""Stopped by a signal, killed, restarted, out of disk: the run loses nothing and goes on exactly."""

import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_runs import (
    SMALL,
    Run,
    at_step,
    command,
    ends_with,
    environment,
    kill_at,
    metrics,
    refusal,
    start,
    stop_at,
    weights,
)

from plmtune.errors import UserError

LONG = ["phases=[{name: main, steps: 5000}]", "checkpoint.every=0", "validation.every=0"]

# A logger that waits at step 3 until it is told to go on, so that a signal can be sent at a known moment.
GATE = """
import time
from pathlib import Path
from plmtune.registry import register

@register("logger", "gate")
class Gate:
    def __init__(self, directory, config):
        pass

    def log(self, step, values):
        if step == 3:
            Path("reached").touch()
            while not Path("go").exists():
                time.sleep(0.01)

    def close(self):
        pass
"""

# A logger that lets no file grow from step 5 on until it is asked to log again: a disk that is full for one step.
FULL = """
import resource
from plmtune.registry import register

@register("logger", "full")
class Full:
    def __init__(self, directory, config):
        self.metrics = directory / "metrics.jsonl"

    def log(self, step, values):
        most = self.metrics.stat().st_size + 20 if step == 5 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    def close(self):
        pass
"""


def begin(place: Path, *arguments: str, processes: int = 1) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*arguments, processes=processes),
        cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(process: "subprocess.Popen[str]", happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while process.poll() is None and not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["status"])


class TestStopping:
    @pytest.mark.parametrize("step", [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 9))])
    def test_killed_and_resumed_ends_byte_identical(self, place: Path, whole: Path, step: int) -> None:
        kill_at(place, step, "cut")
        assert status(place / "cut") == "running"
        assert ends_with("resume", "cut") == 0
        # whole ran with this process's threads, cut with one: sums must not depend on it at this size.
        assert metrics(place / "cut") == metrics(whole)
        assert weights(place / "cut") == weights(whole)

    def test_sigterm_finishes_the_step_saves_and_says_so(self, place: Path) -> None:
        process = begin(place, "run", "pretrain", *SMALL, *LONG, "run_dir=run")
        path = place / "run" / "metrics.jsonl"
        wait_for(process, lambda: path.is_file() and path.stat().st_size > 500)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 75, error
        assert "plmtune resume run" in error
        assert status(place / "run") == "stopped"
        last = metrics(place / "run")[-1]["step"]
        assert (place / f"run/checkpoints/step-{last:08}").is_dir()

    @pytest.mark.parametrize(
        ("number", "moment", "step", "saved"),
        [
            (signal.SIGUSR1, "train_step", 4, 4),
            (signal.SIGTERM, "validate", 6, 6),
            (signal.SIGINT, "save_checkpoint", 3, 4),  # the step after the one that was being saved
            (signal.SIGHUP, "train_step", 12, 12),  # the last one: there is nothing to stop
        ],
    )
    def test_no_step_is_lost_whatever_the_moment(
        self, place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int, moment: str, step: int, saved: int
    ) -> None:
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), number), moment)
            if saved < 12:
                with pytest.raises(SystemExit) as stopped:
                    start("run_dir=cut")
                assert stopped.value.code == 75
            else:
                start("run_dir=cut")
        assert (place / "cut/checkpoints/latest").read_text() == f"step-{saved:08}\n"
        if saved < 12:
            assert metrics(place / "cut")[-1]["step"] == saved
            start("run_dir=cut", "resume=true")
        assert metrics(place / "cut") == metrics(whole)
        assert weights(place / "cut") == weights(whole)

    def test_a_second_signal_ends_at_once(self, place: Path) -> None:
        (place / "gate.py").write_text(GATE)
        process = begin(place, "run", "--import", "gate", "pretrain", *SMALL, "run_dir=run", "logger=gate")
        wait_for(process, (place / "reached").exists)
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        while (line := process.stderr.readline()) and "finishing the step" not in line:
            pass
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert not (place / "run/checkpoints/step-00000003").exists()
        assert status(place / "run") == "running"

    @pytest.mark.slow
    def test_a_signal_to_one_rank_of_two_stops_both_at_one_step(self, place: Path) -> None:
        process = begin(place, "run", "pretrain", *SMALL, *LONG, "run_dir=run", processes=2)
        path = place / "run" / "metrics.jsonl"
        wait_for(process, lambda: path.is_file() and path.stat().st_size > 500)
        (one,) = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
        one.send_signal(signal.SIGUSR1)
        _, error = process.communicate(timeout=100)
        assert process.returncode == 1  # torchrun's own
        # As soon as one has ended, torchrun ends the other, which may be on its way out.
        codes = re.findall(r"exitcode *: (-?\d+)", error)
        assert "75" in codes and {*codes} <= {"75", "-15"}, error
        last = metrics(place / "run")[-1]["step"]
        assert (place / "run/checkpoints/latest").read_text() == f"step-{last:08}\n"


class TestRestart:
    """torchrun --max-restarts starts the same command again, in the place of one that died."""

    @pytest.fixture
    def torchrun(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        return monkeypatch

    def die(self, patch: pytest.MonkeyPatch, step: int, *overrides: str) -> None:
        def fail() -> None:
            raise RuntimeError("a bad day")

        with patch.context() as inner, pytest.raises(RuntimeError, match="a bad day"):
            at_step(inner, step, fail)
            start(*overrides)

    def runs(self, place: Path) -> list[Path]:
        return sorted(path.parent for path in place.glob("runs/pretrain/[0-9]*/config.yaml"))

    @pytest.mark.parametrize("named", [[], ["run_dir=runs/pretrain/1"]])
    def test_resumes_the_run_that_the_job_began(
        self, place: Path, whole: Path, torchrun: pytest.MonkeyPatch, named: list[str]
    ) -> None:
        self.die(torchrun, 5, *named)
        torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        self.die(torchrun, 8, *named)
        torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "2")
        start(*named)
        (run,) = self.runs(place)
        assert [attempt["step"] for attempt in json.loads((run / "run.json").read_text())["attempts"]] == [0, 3, 6]
        assert metrics(run) == metrics(whole)
        assert weights(run) == weights(whole)

    def test_another_jobs_run_is_left_alone(self, place: Path, torchrun: pytest.MonkeyPatch) -> None:
        self.die(torchrun, 2)
        torchrun.setenv("TORCHELASTIC_RUN_ID", "another")
        torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        start("phases=[{name: main, steps: 4}]")
        first, second = self.runs(place)
        assert (status(first), status(second)) == ("failed", "finished")

    def test_a_config_that_was_edited_since_is_refused(self, place: Path, torchrun: pytest.MonkeyPatch) -> None:
        self.die(torchrun, 5)
        torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert "optimizer.lr" in refusal("optimizer.lr=0.9")

    def test_what_its_guard_ended_stays_ended(self, place: Path, torchrun: pytest.MonkeyPatch) -> None:
        self.die(torchrun, 5)
        (run,) = self.runs(place)
        record = json.loads((run / "run.json").read_text())
        record["attempts"][-1]["ended_by"] = "guard"
        (run / "run.json").write_text(json.dumps(record))
        torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert "its guard ended it" in refusal()

    def test_a_new_job_begins_a_new_run(self, place: Path, torchrun: pytest.MonkeyPatch) -> None:
        self.die(torchrun, 2)
        start("phases=[{name: main, steps: 4}]")
        assert len(self.runs(place)) == 2

    def test_a_job_that_has_finished_is_done(self, place: Path, torchrun: pytest.MonkeyPatch) -> None:
        start("phases=[{name: main, steps: 2}]")
        torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        with pytest.raises(SystemExit) as done:
            start("phases=[{name: main, steps: 2}]")
        assert done.value.code == 0
        assert len(self.runs(place)) == 1


class TestDiskFull:
    def limited(self, most: int, *arguments: str) -> object:
        """The exit code of a command that can write no file beyond `most` bytes."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            return ends_with(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    # capsys keeps what is said in memory: files of it could not grow either.
    def test_while_preparing_data_leaves_nothing_of_it(self, place: Path, capsys: Any) -> None:
        assert self.limited(5_000, "run", "pretrain", *SMALL, "run_dir=run") == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1] == "plmtune: runs/data cannot be written: File too large"
        assert [path.name for path in place.rglob("*") if path.suffix in (".bin", ".json", ".tmp")] == []
        assert not (place / "run").exists()

    def test_while_a_run_begins_leaves_no_run(self, place: Path, capsys: Any) -> None:
        assert ends_with("data", "prepare", "corpus", "--tokenizer", "byte") == 0
        assert self.limited(400, "run", "pretrain", *SMALL, "run_dir=run") == 2
        assert "plmtune: run cannot be used as a run directory: File too large" in capsys.readouterr().err
        assert not (place / "run").exists()

    @pytest.mark.slow
    def test_while_metrics_are_written_saves_and_loses_no_line(self, place: Path, plmtune: Run) -> None:
        (place / "full.py").write_text(FULL)
        keys = [*SMALL, "validation.every=0", "checkpoint.background=false"]  # else the disk could be full for a save
        start("run_dir=whole", *keys)
        done = plmtune("run", "--import", "full", "pretrain", *keys, "run_dir=cut", "logger=full")
        assert done.returncode == 2, done.stderr
        said = done.stderr.splitlines()[-1]
        assert "cut/metrics.jsonl cannot be written: File too large" in said and "plmtune resume cut" in said
        # The line of step 6 did not fit, so the run stopped there; at the end there was room for it.
        assert (place / "cut/checkpoints/latest").read_text() == "step-00000006\n"
        assert [json.loads(line)["step"] for line in (place / "cut/metrics.jsonl").read_text().splitlines()] == [
            1, 2, 3, 4, 5, 6,
        ]  # fmt: skip
        assert plmtune("resume", "--import", "full", "cut", "logger=jsonl").returncode == 0
        assert metrics(place / "cut") == metrics(place / "whole")
        assert weights(place / "cut") == weights(place / "whole")

    def test_a_logger_that_fails_does_not_lose_the_run(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from plmtune.training.loggers import JsonLines

        def fail(self: Any, step: int, values: Any) -> None:
            if step == 4:
                raise ConnectionError("the server is gone")

        monkeypatch.setattr(JsonLines, "log", fail)
        with pytest.raises(UserError, match=r"JsonLines cannot be written: .*the server is gone.*plmtune resume run"):
            start("run_dir=run")
        assert (place / "run/checkpoints/latest").read_text() == "step-00000004\n"
        assert [entry["step"] for entry in metrics(place / "run")] == [1, 2, 3, 4]


def test_a_stopped_run_can_be_found_by_its_config(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no unfinished run"):
        start("resume=true")
    start("phases=[{name: main, steps: 4}]")  # finished: it is not gone on with
    stop_at(monkeypatch, 5)
    start("resume=true")
    newest = max(place.glob("runs/pretrain/[0-9]*"))
    record = json.loads((newest / "run.json").read_text())
    assert record["status"] == "finished"
    assert [attempt["step"] for attempt in record["attempts"]] == [0, 5]
