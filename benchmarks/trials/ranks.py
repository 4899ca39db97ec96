"""Bar 2 with many processes: SIGKILL of one of two ranks that save together."""

from __future__ import annotations

import contextlib
import random
import signal
import time

import psutil

from .place import SMALL, STEPS, Job, Place, differing, outcome, reach, torn
from .tally import Tally

PROCESSES = 2
FSDP = ["runtime.strategy=fsdp"]


def killed_rank(place: Place, count: int, generator: random.Random) -> Tally:
    """SIGKILL of rank 0 or 1 while both write a checkpoint, by FSDP2 under torchrun."""
    tally = Tally(
        "SIGKILL of one of two ranks in a save",
        "the job ends; no checkpoint is torn; resumed with two processes, all equals an undisturbed run's",
    )
    expected = outcome(place.whole(*FSDP, processes=PROCESSES))
    for number in range(count):
        name = f"rank-killed-{number}"
        run = place.path / name
        job = place.start("run", "pretrain", *SMALL, *FSDP, f"run_dir={name}", processes=PROCESSES)
        reach(job, run, generator.randrange(3, STEPS - 6))
        rank = generator.randrange(PROCESSES)
        process = _rank(job, rank)
        stage = run / "checkpoints"
        job.until(lambda stage=stage: any(stage.glob(".tmp-*")))  # type: ignore[misc]
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        complaints = [] if job.wait() == 1 else ["torchrun did not end with 1"]
        tally.saw("a save was under way" if any(stage.glob(".tmp-*")) else "the save was over")
        complaints += torn(stage)
        code, said = place.run("resume", name, processes=PROCESSES)
        complaints += [f"resume ended with {code}: {said[-500:]}"] if code else differing(run, expected)
        tally.add(f"rank {rank} killed", complaints)
    return tally


def _rank(job: Job, number: int) -> psutil.Process:
    """The process of a rank, known by its environment."""
    for child in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.environ().get("RANK") == str(number):
                return child
    raise RuntimeError(f"there is no rank {number}:\n{job.said()}")
