"""Jobs on a real Slurm with one node, this machine (Debian's slurm-wlm and munge)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from slurm_cluster import cluster, missing_programs

pytest.importorskip("submitit", reason="needs the extra slurm")

RUN = [
    "run", "pretrain", "model=plm_tiny", "tokenizer=byte", "data=files", "data.paths=[corpus.txt]", "optimizer=adamw",
    "scheduler=wsdc", "runtime.precision=fp32", "logger=jsonl", "seq_len=32", "global_batch_size=4",
    "micro_batch_size=2", "phases=[{name: main, steps: 150}]", "log_every=1", "sample.max_new_tokens=0",
    "validation.tokens=500", "checkpoint.every=50",
]  # fmt: skip


class Slurm:
    """A running cluster, and plmtune as a user of it."""

    def __init__(self, environment: dict[str, str], place: Path) -> None:
        self.environment, self.place = environment, place

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def plmtune(self, *arguments: str) -> str:
        return self.call(sys.executable, "-m", "plmtune", *arguments)

    def submit(self, run_dir: str) -> str:
        """Launch the run on two processes; returns the job's number."""
        self.plmtune("launch", "slurm", "--processes", "2", "--time", "10m", *RUN, f"run_dir={run_dir}")
        return str(json.loads((self.place / run_dir / "launch.json").read_text())["job"])

    def wait(self, run_dir: str, done: Callable[[Path], bool]) -> None:
        deadline = time.monotonic() + 300
        while not done(self.place / run_dir):
            assert time.monotonic() < deadline, self.logs(run_dir)
            time.sleep(0.3)

    def logs(self, run_dir: str) -> str:
        return "\n".join(path.read_text()[-2000:] for path in (self.place / run_dir / "ranks").glob("*"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := missing_programs():
        pytest.skip(f"needs Slurm: apt-get install slurm-wlm munge ({', '.join(missing)} not found)")
    place = tmp_path_factory.mktemp("work")
    (place / "corpus.txt").write_text("".join(f"Line {n} of a small corpus.\n" for n in range(2000)))
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        yield Slurm(environment, place)


def finished(run: Path) -> bool:
    record = run / "run.json"
    return record.is_file() and json.loads(record.read_text()).get("status") == "finished"


def steps(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


@pytest.mark.slow
def test_a_job_that_is_queued_again_ends_with_the_weights_of_an_undisturbed_one(slurm: Slurm) -> None:
    slurm.submit("calm")
    slurm.wait("calm", finished)
    assert "ended" in slurm.plmtune("runs", "calm")
    job = slurm.submit("stopped")
    slurm.wait("stopped", lambda run: steps(run) >= 5)
    slurm.call("scancel", "--signal=USR1", job)  # what Slurm sends ahead of the time limit
    slurm.wait("stopped", finished)
    logs = slurm.logs("stopped")
    assert "resuming after step" in logs, logs
    weights = [
        load_file(slurm.place / name / "checkpoints" / "step-00000150" / "model.safetensors")
        for name in ("calm", "stopped")
    ]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
