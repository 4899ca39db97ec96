"""Runs under tensor and pipeline parallelism as a person starts them: what they learn, and a rank that is killed."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from cli_runs import SMALL, Run, metrics, start, weights
from test_processes import close, end, rank, torchrun, wait_for_step

pytestmark = pytest.mark.slow

DEEP = [*SMALL, "model.num_layers=4", "tokenizer=bundled", "micro_batch_size=1"]
QUIET = ["validation={every: 0, tokens: 100}", "checkpoint={every: 3, keep: 0}", "runtime.timeout_minutes=0.5"]

LAYOUTS = [
    (2, ["parallel.tp=2"]),
    (2, ["parallel.pp=2", "parallel.schedule=zbv"]),
    (4, ["parallel.pp=2", "parallel.tp=2"]),
    (4, ["parallel.tp=2", "parallel.dp_shard=2"]),
    (8, ["parallel.pp=2", "parallel.tp=2", "parallel.dp_shard=2"]),
]


class TestALayout:
    @pytest.mark.parametrize(("processes", "layout"), LAYOUTS)
    def test_learns_what_one_process_does_and_one_resumes_its_run(
        self, place: Path, plmtune: Run, processes: int, layout: list[str]
    ) -> None:
        keys = [*DEEP, "ema.decay=0.9"]
        start(*keys, "run_dir=one")
        done = plmtune("run", "pretrain", *keys, *layout, "run_dir=many", processes=processes)
        assert done.returncode == 0, done.stderr
        close(metrics(place / "one"), metrics(place / "many"))
        for step in (12, 9):
            shutil.rmtree(place / f"many/checkpoints/step-{step:08}")
        one_process = [f"{key.partition('=')[0]}=1" for key in layout if "schedule" not in key]
        done = plmtune("resume", "many", *one_process)
        assert done.returncode == 0, done.stderr
        assert "resuming after step 6" in done.stderr
        close(metrics(place / "one"), metrics(place / "many"))

    @pytest.mark.parametrize(("processes", "layout"), LAYOUTS[2:3])
    def test_starts_from_the_weights_of_another_run(
        self, place: Path, plmtune: Run, processes: int, layout: list[str]
    ) -> None:
        start(*DEEP, "run_dir=before", "phases=[{name: main, steps: 3}]")
        keys = [*DEEP, "init_from=before", "phases=[{name: main, steps: 3}]"]
        start(*keys, "run_dir=one")
        done = plmtune("run", "pretrain", *keys, *layout, "run_dir=many", processes=processes)
        assert done.returncode == 0, done.stderr
        close(metrics(place / "one"), metrics(place / "many"))


class TestADeadRank:
    @pytest.mark.parametrize(("processes", "layout"), LAYOUTS)
    def test_ends_the_job_is_named_and_the_restart_goes_on_equal(
        self, place: Path, processes: int, layout: list[str]
    ) -> None:
        keys = ["run", "pretrain", *DEEP, *QUIET, *layout, "phases=[{name: main, steps: 12}]"]
        with torchrun(place, *keys, "run_dir=whole", processes=processes) as job:
            code, said = end(place, job, 300)
            assert code == 0, said
        dead = processes - 1
        with torchrun(place, *keys, "run_dir=cut", processes=processes) as job:
            wait_for_step(place, "cut", 4, job)
            rank(job, dead).send_signal(signal.SIGKILL)
            killed = time.monotonic()
            code, said = end(place, job, 300)
        assert code == 1, said
        # torchrun gives the others 30 seconds to end, as they wait for 30 at most (runtime.timeout_minutes).
        assert time.monotonic() - killed < 90
        cause = said[said.index("Root Cause") :]
        assert re.search(rf"rank +: {dead} ", cause), cause
        assert "Signal 9 (SIGKILL)" in cause
        lost = re.findall(r"Rank \d+ lost (.*?) in ", said)
        assert all(re.search(rf"\b{dead}\b", ranks) for ranks in lost), said
        with torchrun(place, *keys, "run_dir=again", processes=processes, options=("--max-restarts=1",)) as job:
            wait_for_step(place, "again", 6, job)  # the save of step 3 is on the disk by then
            rank(job, dead).send_signal(signal.SIGKILL)
            code, said = end(place, job, 300)
        assert code == 0, said
        assert "resuming after step" in said
        assert weights(place / "again") == weights(place / "whole")
        assert metrics(place / "again") == metrics(place / "whole")
