"""How launched jobs stand, as squeue and sacct say."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_commands import install, only

from plmtune.launch.queue import queue_states
from plmtune.launch.record import Launch

PATHS = [Path("runs/a"), Path("runs/b"), Path("runs/c")]
LAUNCHES = {path: Launch("slurm", str(n), 1, 2, ["run", "demo"]) for n, path in enumerate(PATHS, 7)}


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(tmp_path, monkeypatch)


def test_squeue_tells_of_the_jobs_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    lines = "7|PENDING|Priority|\\n8|RUNNING|None|gpu[1-2]\\n9|TIMEOUT|TimeLimit|gpu3\\n"
    bin = install(tmp_path, monkeypatch, squeue=f"printf '{lines}'")
    assert list(queue_states(LAUNCHES).values()) == [
        "job 7: queued (Priority)", "job 8: running on gpu[1-2]", "job 9: ended: timeout",
    ]  # fmt: skip
    assert "--jobs=7,8,9" in (bin / "squeue.given").read_text()


def test_sacct_tells_of_jobs_that_left_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    answers = {
        "squeue": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        "sacct": "printf '7|CANCELLED by 1000|gpu1\\n8|NODE_FAIL|gpu1\\n'",
    }
    install(tmp_path, monkeypatch, **answers)
    assert list(queue_states(LAUNCHES).values()) == [
        "job 7: ended: cancelled", "job 8: ended: node fail", "job 9: no longer in the queue",
    ]  # fmt: skip


def test_without_squeue_the_state_is_unknown_and_says_why() -> None:
    assert set(queue_states(LAUNCHES).values()) == {f"job {n}: unknown, there is no squeue here" for n in (7, 8, 9)}


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    install(tmp_path, monkeypatch, squeue="echo 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1")
    (state, *_) = queue_states(LAUNCHES).values()
    assert state == "job 7: unknown, squeue says: slurm_load_jobs error: Unable to contact controller"


def test_nothing_is_asked_without_launches() -> None:
    assert queue_states({}) == {}
