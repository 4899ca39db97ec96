"""Many processes as a person starts them: they learn what one does, and a rank that dies or hangs ends the job."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_runs import SMALL, Run, environment, kill_all, metrics, start, weights

STEPS = "phases=[{name: main, steps: 40}]"
QUIET = ["validation={every: 0, tokens: 100}", "checkpoint={every: 5, keep: 0}"]

BREAKS = """
whole = Pretrain.train_step

def breaks(self, *arguments):
    if self.step == 4 and self.runtime.rank == 1:
        raise KeyError("of mine")
    return whole(self, *arguments)

Pretrain.train_step = breaks
"""


@contextlib.contextmanager
def torchrun(
    place: Path, *arguments: str, processes: int = 2, options: tuple[str, ...] = (), output: str = "output"
) -> Iterator[Any]:
    """``torchrun ... -m plmtune ARGUMENTS``, killed with all its workers at the end if it has not ended itself."""
    alone = [] if any(option.startswith("--nnodes") for option in options) else ["--standalone"]
    words = ["torch.distributed.run", *alone, f"--nproc-per-node={processes}", *options]
    with (place / output).open("w") as file:
        job = subprocess.Popen(
            [sys.executable, "-m", *words, "-m", "plmtune", *arguments],
            cwd=place, env=environment(), stdout=file, stderr=file,
        )  # fmt: skip
        try:
            yield job
        finally:
            kill_all(job)


def rank(job: Any, number: int) -> psutil.Process:
    """The process of a rank, known by its environment, as soon as it has been started."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(job.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.environ().get("RANK") == str(number):
                    return child
        time.sleep(0.01)
    raise AssertionError(f"there is no rank {number}")


def rank_of(job: Any) -> str | None:
    """The rank of the only worker of a torchrun."""
    (worker,) = (child for child in psutil.Process(job.pid).children() if "RANK" in child.environ())
    return worker.environ()["RANK"]


def wait_for_step(place: Path, run: str, step: int, job: Any) -> None:
    path = place / run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (path.is_file() and f'"step": {step}' in path.read_text()):
        assert job.poll() is None, (place / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(place: Path, job: Any, timeout: float = 120) -> tuple[int | None, str]:
    """The exit code, None if it has not ended, and all output."""
    try:
        code = job.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    return code, (place / "output").read_text()


def close(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for a, b in zip(one, other, strict=True):
        for key, tolerance in (("loss", 1e-6), ("validation_loss", 1e-6), ("bits_per_byte", 1e-6), ("grad_norm", 1e-5)):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=tolerance)


class TestFourProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("four", "two"),
        [
            (["runtime.strategy=hsdp", "runtime.shard_size=2"], ["runtime.strategy=fsdp", "runtime.shard_size=null"]),
            (["runtime.strategy=fsdp"], ["runtime.strategy=ddp"]),
        ],
    )
    def test_learn_what_one_does_and_fewer_resume_from_their_checkpoint(
        self, place: Path, plmtune: Run, four: list[str], two: list[str]
    ) -> None:
        start("run_dir=one", "runtime.strategy=auto")
        done = plmtune("run", "pretrain", *SMALL, "run_dir=four", *four, processes=4)
        assert done.returncode == 0, done.stderr
        assert f"{four[0].removeprefix('runtime.').replace('=', ': ')} (" in done.stderr
        close(metrics(place / "one"), metrics(place / "four"))
        for step in (12, 9):
            shutil.rmtree(place / f"four/checkpoints/step-{step:08}")
        shutil.copytree(place / "four", place / "alone")
        done = plmtune("resume", "four", *two, processes=2)
        assert done.returncode == 0, done.stderr
        assert "resuming after step 6" in done.stderr
        close(metrics(place / "one"), metrics(place / "four"))
        start("run_dir=alone", "resume=true")
        close(metrics(place / "one"), metrics(place / "alone"))


class TestThreeProcesses:
    @pytest.mark.slow
    def test_ddp_resumed_is_byte_identical(self, place: Path, plmtune: Run) -> None:
        # Sums of three depend on their order, which DDP's buckets decide, laid anew after its first backward.
        given = [*SMALL, "global_batch_size=6", "micro_batch_size=1", "phases=[{name: main, steps: 6}]", *QUIET[:1],
                 "checkpoint={every: 3, keep: 0}"]  # fmt: skip
        whole = plmtune("run", "pretrain", *given, "run_dir=whole", processes=3)
        assert whole.returncode == 0, whole.stderr
        shutil.copytree(place / "whole", place / "cut")
        shutil.rmtree(place / "cut/checkpoints/step-00000006")
        resumed = plmtune("resume", "cut", processes=3)
        assert resumed.returncode == 0, resumed.stderr
        assert metrics(place / "cut") == metrics(place / "whole")
        assert weights(place / "cut") == weights(place / "whole")


class TestADeadRank:
    @pytest.mark.slow
    def test_restarted_workers_end_with_the_weights_of_an_undisturbed_run(self, place: Path) -> None:
        keys = ["run", "pretrain", *SMALL, *QUIET, STEPS, "runtime.strategy=fsdp"]
        with torchrun(place, *keys, "run_dir=whole") as job:
            code, said = end(place, job)
            assert code == 0, said
        with torchrun(place, *keys, "run_dir=cut", options=("--max-restarts=1",)) as job:
            wait_for_step(place, "cut", 12, job)
            rank(job, 1).send_signal(signal.SIGKILL)
            code, said = end(place, job)
        assert code == 0, said
        assert "resuming after step" in said
        assert weights(place / "cut") == weights(place / "whole")
        assert metrics(place / "cut") == metrics(place / "whole")

    def test_ends_the_job_at_once_and_is_named(self, place: Path) -> None:
        with torchrun(place, "run", "pretrain", *SMALL, *QUIET, STEPS, "run_dir=cut") as job:
            wait_for_step(place, "cut", 7, job)
            rank(job, 1).send_signal(signal.SIGKILL)
            killed = time.monotonic()
            code, said = end(place, job)
        assert code == 1, said
        assert time.monotonic() - killed < 40  # seconds, on a machine that does other things too
        cause = said[said.index("Root Cause") :]
        assert re.search(r"rank +: 1 ", cause) and "Signal 9 (SIGKILL)" in cause
        assert "pretrain.py" not in said  # no traceback of the rank that only noticed

    @pytest.mark.slow
    def test_its_own_error_is_shown_with_its_traceback(self, place: Path, plmtune: Run) -> None:
        assert plmtune("cp", "recipes/pretrain", "mine.py").returncode == 0
        with (place / "mine.py").open("a") as recipe:
            recipe.write(BREAKS)
        with torchrun(place, "run", "mine.py", *SMALL, *QUIET, STEPS, "run_dir=cut") as job:
            code, said = end(place, job)
        assert code == 1, said
        cause = said[said.index("Root Cause") :]
        assert re.search(r"rank +: 1 ", cause)
        assert 'raise KeyError("of mine")' in cause and "KeyError: 'of mine'" in cause

    @pytest.mark.slow
    def test_on_another_machine_is_restarted_with_all_others(self, place: Path) -> None:
        # Each torchrun counts the failures of its own workers: those of rank 0 do not hear that they were restarted.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two"]
        options = (*meet, "--max-restarts=1")
        keys = ["run", "pretrain", *SMALL, *QUIET, STEPS, "runtime.strategy=fsdp"]
        with (
            torchrun(place, *keys, "run_dir=cut", processes=1, options=options) as one,
            torchrun(place, *keys, "run_dir=cut", processes=1, options=options, output="other") as other,
        ):
            wait_for_step(place, "cut", 12, one)
            victim = next(job for job in (one, other) if rank_of(job) == "1")
            rank(victim, 1).send_signal(signal.SIGKILL)
            code, said = end(place, one)
            assert (code, end(place, other)[0]) == (0, 0), said + (place / "other").read_text()
        with torchrun(place, *keys, "run_dir=whole") as job:
            assert end(place, job)[0] == 0
        assert weights(place / "cut") == weights(place / "whole")
        assert metrics(place / "cut") == metrics(place / "whole")


class TestASilentRank:
    @pytest.mark.slow
    def test_is_named_by_the_others_which_end_and_say_what_they_waited_for(self, place: Path) -> None:
        # Slow: torchrun waits 30 seconds for a stopped process before it kills it.
        keys = ["runtime.timeout_minutes=0.1", "run_dir=cut"]
        with torchrun(place, "run", "pretrain", *SMALL, *QUIET, STEPS, *keys) as job:
            wait_for_step(place, "cut", 7, job)
            rank(job, 1).send_signal(signal.SIGSTOP)
            code, said = end(place, job)
        assert code == 1, said
        assert "Rank 0 waited 6 seconds (runtime.timeout_minutes) in" in said
        assert "for rank 1, which did not answer" in said
        assert "Traceback" in said and "recipes/pretrain.py" in said

    @pytest.mark.slow
    def test_that_never_comes_is_named(self, place: Path) -> None:
        keys = ["runtime.timeout_minutes=0.05", "run_dir=never"]
        with torchrun(place, "run", "pretrain", *SMALL, *keys) as job:
            rank(job, 1).send_signal(signal.SIGSTOP)  # while it imports
            deadline, said = time.monotonic() + 60, ""
            while "did not join" not in said and time.monotonic() < deadline:
                said = (place / "output").read_text()
                time.sleep(0.05)
        assert "plmtune: The 2 processes did not find each other within 3 seconds" in said
        assert "rank 1 did not join" in said
