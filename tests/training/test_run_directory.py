"""A run directory belongs to one process at a time and says what happened in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plmtune.errors import UserError
from plmtune.training.run_directory import EXIT_STOPPED, RunDirectory


def create(path: Path, **keys) -> RunDirectory:
    return RunDirectory.create(path, "seed: 1\n", ["plmtune", "run", "pretrain"], **keys)


class TestCreate:
    def test_says_what_runs(self, tmp_path):
        with create(tmp_path / "run", data={"stdlib": "abc"}) as run:
            record = run.record()
        assert record["command"] == ["plmtune", "run", "pretrain"]
        assert record["data"] == {"stdlib": "abc"}
        assert record["versions"]["torch"]
        assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"

    def test_a_directory_with_a_run_is_refused_and_left_as_it_is(self, tmp_path):
        create(tmp_path).close()
        before = (tmp_path / "run.json").read_bytes()
        with pytest.raises(UserError, match=r"already holds a run.*plmtune resume"):
            create(tmp_path)
        assert (tmp_path / "run.json").read_bytes() == before

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"file/run cannot be used as a run directory"):
            create(tmp_path / "file" / "run")

    def test_other_ranks_write_nothing(self, tmp_path):
        with create(tmp_path / "run", is_main=False) as run:
            run.update(x=1)
        assert not (tmp_path / "run").exists()

    def test_outside_of_a_repository_there_is_no_git_state(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        with create(tmp_path / "run") as run:
            assert run.record()["git"] is None


class TestOpen:
    def test_counts_another_attempt(self, tmp_path):
        create(tmp_path).close()
        with RunDirectory.open(tmp_path) as run:
            assert run.record()["attempts"] == 2

    def test_what_a_killed_process_half_wrote_is_removed(self, tmp_path):
        create(tmp_path).close()
        (tmp_path / ".run.json.tmp-1234").write_text("{")
        RunDirectory.open(tmp_path).close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "lock", "run.json"]

    def test_a_directory_without_a_run_is_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no run: it has no config\.yaml"):
            RunDirectory.open(tmp_path)


class TestStatus:
    def test_a_run_that_ends_is_finished(self, tmp_path):
        with create(tmp_path) as run:
            assert run.record()["status"] == "running"
        assert run.record()["status"] == "finished"

    def test_a_run_that_raises_has_failed(self, tmp_path):
        with pytest.raises(RuntimeError), create(tmp_path) as run:
            raise RuntimeError
        assert run.record()["status"] == "failed"

    def test_a_run_that_a_signal_ended_is_stopped(self, tmp_path):
        with pytest.raises(SystemExit), create(tmp_path) as run:
            raise SystemExit(EXIT_STOPPED)
        assert run.record()["status"] == "stopped"

    def test_a_damaged_record_does_not_block(self, tmp_path):
        create(tmp_path).close()
        (tmp_path / "run.json").write_text("{")
        with RunDirectory.open(tmp_path) as run:
            assert run.record()["status"] == "running"


class TestLock:
    def test_a_second_process_is_refused_by_the_first_ones_number(self, tmp_path):
        with create(tmp_path):
            code = (
                "import sys; from plmtune.errors import UserError\n"
                "from plmtune.training.run_directory import RunDirectory\n"
                "try: RunDirectory.open(sys.argv[1])\n"
                "except UserError as error: print(error)"
            )
            done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
            assert f"is in use by process {os.getpid()}" in done.stdout

    def test_a_killed_process_gives_its_lock_back(self, tmp_path):
        create(tmp_path).close()
        code = (
            "import sys, time; from plmtune.training.run_directory import RunDirectory\n"
            "run = RunDirectory.open(sys.argv[1]); print('locked', flush=True); time.sleep(60)"
        )
        child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {child.pid}"):
            RunDirectory.open(tmp_path)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        RunDirectory.open(tmp_path).close()

    def test_closing_gives_it_back(self, tmp_path):
        create(tmp_path).close()
        RunDirectory.open(tmp_path).close()
        RunDirectory.open(tmp_path).close()
