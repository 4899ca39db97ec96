"""A run directory belongs to one process at a time and says what happened in it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.io.run_directory import RunDirectory, refuse_if_in_use, resolve_link, verify_config
from plmtune.io.signals import EXIT_STOPPED


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

    def test_a_disk_that_is_full_leaves_nothing_of_it(self, tmp_path, monkeypatch):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").touch()

        def full(path: Path, text: str) -> None:
            if path.name == "config.yaml":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            path.write_text(text)

        monkeypatch.setattr(manifest, "write_text", full)
        for name in ("run", "mine"):
            with pytest.raises(UserError, match=f"{name} cannot be used as a run directory: No space left"):
                create(tmp_path / name)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes.txt"]

    def test_other_ranks_write_nothing(self, tmp_path):
        with RunDirectory(tmp_path / "run") as run:
            run.update(x=1)
        assert not (tmp_path / "run").exists()

    def test_outside_of_a_repository_there_is_no_git_state(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        with create(tmp_path / "run") as run:
            assert run.record()["git"] is None


class TestOpen:
    def test_notes_each_attempt_and_what_it_changes(self, tmp_path):
        create(tmp_path).close()
        with RunDirectory.open(tmp_path, changed={"seed": [1, 2]}) as run:
            run.note(step=7)
            first, second = run.record()["attempts"]
        assert first["pid"] == second["pid"] == os.getpid()
        assert "changed" not in first and "step" not in first
        assert (second["changed"], second["step"]) == ({"seed": [1, 2]}, 7)

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

    def test_a_run_that_raises_has_failed_and_says_why(self, tmp_path):
        with pytest.raises(RuntimeError), create(tmp_path) as run:
            raise RuntimeError
        assert (run.record()["status"], run.record()["reason"]) == ("failed", "RuntimeError")
        with pytest.raises(UserError), RunDirectory.open(tmp_path) as run:
            assert run.record()["reason"] is None
            raise UserError("the disk is full")
        assert run.record()["reason"] == "the disk is full"

    def test_a_run_that_a_signal_ended_is_stopped(self, tmp_path):
        with pytest.raises(SystemExit), create(tmp_path) as run:
            raise SystemExit(EXIT_STOPPED)
        assert run.record()["status"] == "stopped"

    def test_a_damaged_record_does_not_block(self, tmp_path):
        create(tmp_path).close()
        (tmp_path / "run.json").write_text("{")
        with RunDirectory.open(tmp_path) as run:
            assert run.record()["status"] == "running"

    def test_an_error_is_not_hidden_by_a_record_that_cannot_be_written(self, tmp_path, monkeypatch):
        def full(path: Path, text: str) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(UserError, match="the first"), create(tmp_path):
            monkeypatch.setattr(manifest, "write_text", full)
            raise UserError("the first")
        with pytest.raises(UserError, match="No space left"):
            RunDirectory.open(tmp_path)


class TestLinks:
    def test_newest_names_the_run_started_last_and_latest_the_one_that_finished_last(self, tmp_path):
        folder = tmp_path / "runs" / "pretrain"

        def links() -> dict[str, str]:
            return {path.name: str(path.readlink()) for path in folder.iterdir() if path.is_symlink()}

        first = create(folder / "1")
        assert links() == {"newest": "1"}
        with pytest.raises(RuntimeError), create(folder / "2"):
            raise RuntimeError
        assert links() == {"newest": "2"}
        with create(folder / "3"):
            pass
        assert links() == {"newest": "3", "latest": "3"}
        with first:
            pass
        assert links() == {"newest": "3", "latest": "1"}

    def test_a_place_that_a_person_named_gets_none(self, tmp_path):
        with create(tmp_path / "mine" / "run"):
            pass
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["run"]

    def test_a_run_is_not_known_by_a_link_that_may_come_to_name_another(self, tmp_path):
        create(tmp_path / "runs" / "a" / "1").close()
        assert resolve_link(tmp_path / "runs/a/newest") == tmp_path / "runs/a/1"
        assert resolve_link(tmp_path / "runs/a/1") == tmp_path / "runs/a/1"


class TestConfig:
    def test_a_run_vouches_for_its_own(self, tmp_path):
        create(tmp_path).close()
        assert verify_config(tmp_path)

    def test_one_that_was_changed_is_refused_with_both_hashes(self, tmp_path):
        create(tmp_path).close()
        (tmp_path / "config.yaml").write_text("seed: 2\n")
        with pytest.raises(UserError, match=rf"config.yaml is not what.*{manifest.digest(tmp_path / 'config.yaml')}"):
            verify_config(tmp_path)

    @pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"status": "running"}'])
    def test_a_record_that_says_nothing_vouches_for_nothing(self, tmp_path, text):
        create(tmp_path).close()
        (tmp_path / "run.json").write_bytes(text)
        assert not verify_config(tmp_path)


class TestLock:
    def test_a_second_process_is_refused_by_the_first_ones_number(self, tmp_path):
        with create(tmp_path):
            code = (
                "import sys; from plmtune.errors import UserError\n"
                "from plmtune.io.run_directory import RunDirectory\n"
                "try: RunDirectory.open(sys.argv[1])\n"
                "except UserError as error: print(error)"
            )
            done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
            assert f"is in use by process {os.getpid()}" in done.stdout

    def test_a_killed_process_gives_its_lock_back(self, tmp_path):
        create(tmp_path).close()
        code = (
            "import sys, time; from plmtune.io.run_directory import RunDirectory\n"
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

    def test_who_only_looks_keeps_nobody_out(self, tmp_path):
        refuse_if_in_use(tmp_path)  # nothing is there
        create(tmp_path).close()
        before = sorted(tmp_path.iterdir())
        refuse_if_in_use(tmp_path)
        assert sorted(tmp_path.iterdir()) == before
        looking = (tmp_path / "lock").open()
        fcntl.flock(looking, fcntl.LOCK_SH)  # as one that looks does, for a moment
        Timer(0.1, looking.close).start()
        with RunDirectory.open(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            refuse_if_in_use(tmp_path)

    def test_a_lock_that_was_removed_is_not_held(self, tmp_path):
        """Who waits for the lock of a run that cannot begin, and is removed, must not think that it has it."""
        create(tmp_path).close()
        stale = (tmp_path / "lock").open()
        (tmp_path / "lock").unlink()
        fcntl.flock(stale, fcntl.LOCK_EX)
        with RunDirectory.open(tmp_path), pytest.raises(UserError, match="in use"):
            RunDirectory.open(tmp_path)
        stale.close()

    def test_closing_gives_it_back(self, tmp_path):
        create(tmp_path).close()
        RunDirectory.open(tmp_path).close()
        RunDirectory.open(tmp_path).close()
