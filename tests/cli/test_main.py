"""How the command line ends: a sentence for what a person can mend, and one word of many processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# main() with a command that fails as told, in a process that believes that it is a rank.
FAILING = """
import os, sys, time
import click
import plmtune.cli
from plmtune.errors import UserError

plmtune.cli.WAIT_FOR_RANK_0 = 0.5

@click.command()
def command():
    print("begun")
    RAISE

plmtune.cli.cli = command
sys.argv = ["plmtune"]
try:
    plmtune.cli.main()
finally:
    print("an orderly end")
"""


def fail(how: str, *, rank: int | None = None, error_file: Path | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")}
    if rank is not None:
        environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(error_file)}
    return subprocess.run(
        [sys.executable, "-c", FAILING.replace("RAISE", how)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


class TestSystemErrors:
    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("open('/dev/full', 'w', buffering=1).write('x\\n')", "plmtune: No space left on device. Make room"),
            ("raise OSError(27, 'File too large', 'big.bin')", "plmtune: big.bin: File too large. Files may not grow"),
            ("raise PermissionError(13, 'Permission denied', 'x')", "plmtune: x: Permission denied. Change its"),
            ("raise OSError(5, 'Input/output error', 'x')", "plmtune: x: Input/output error. The device fails"),
        ],
    )
    def test_are_told_in_a_sentence_with_the_path(self, how: str, said: str) -> None:
        done = fail(how)
        assert done.returncode == 2
        assert done.stderr.startswith(said) and done.stderr.count("\n") == 1, done.stderr

    def test_others_are_bugs_and_keep_their_traceback(self) -> None:
        done = fail("open('/nowhere/at/all')")
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback") and "/nowhere/at/all" in done.stderr

    def test_output_that_nobody_can_store_ends_with_a_sentence(self) -> None:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "plmtune", "ls"], stdout=full, stderr=-1, text=True, check=False
            )
        assert done.returncode == 2
        assert done.stderr.startswith("plmtune: No space left on device.")


class TestOneOfMany:
    def test_rank_0_says_it_at_once_and_ends_at_once(self, tmp_path: Path) -> None:
        done = fail("raise UserError('no data')", rank=0, error_file=tmp_path / "error.json")
        assert (done.returncode, done.stderr) == (2, "plmtune: no data\n")
        assert done.stdout == "begun\n"  # and no orderly end, which could wait for the others
        told = json.loads((tmp_path / "error.json").read_text())["message"]
        assert told["message"] == told["extraInfo"]["py_callstack"] == "plmtune: no data"

    def test_another_rank_says_it_with_its_number_only_if_rank_0_has_not_ended_the_job(self, tmp_path: Path) -> None:
        before = time.time()
        done = fail("raise UserError('no data')", rank=1, error_file=tmp_path / "error.json")
        assert (done.returncode, done.stderr) == (2, "[rank 1] plmtune: no data\n")
        # The time is that of the failure, so that torchrun takes it for the first one.
        told = json.loads((tmp_path / "error.json").read_text())["message"]
        assert int(before) <= int(told["extraInfo"]["timestamp"]) <= time.time()

    def test_a_bug_shows_its_rank_and_traceback_here_and_in_torchruns_summary(self, tmp_path: Path) -> None:
        done = fail("raise KeyError('a bug')", rank=1, error_file=tmp_path / "error.json")
        assert done.returncode == 1
        assert done.stderr.startswith("[rank 1] Traceback") and "KeyError: 'a bug'" in done.stderr
        told = json.loads((tmp_path / "error.json").read_text())["message"]
        assert told["message"] == "KeyError: 'a bug'"
        assert told["extraInfo"]["py_callstack"].startswith("Traceback")

    def test_torchs_own_reader_understands_what_is_left_for_it(self, tmp_path: Path) -> None:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

        fail("raise UserError('no data')", rank=0, error_file=tmp_path / "error.json")
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
        assert "traceback : plmtune: no data" in str(ChildFailedError("plmtune", {0: failure}))
