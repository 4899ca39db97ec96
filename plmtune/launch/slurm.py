"""Submit a run to Slurm: submitit writes the batch script, sends it, and reads the number of the job."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from plmtune.errors import UserError
from plmtune.extras import installed, missing
from plmtune.io.signals import EXIT_STOPPED

# The run was stopped by Slurm's signal: it saved (75), or had nothing to save yet and was ended (SIGUSR1, SIGTERM).
_STOPPED = (EXIT_STOPPED, 128 + 10, 128 + 15)
# After one process has ended, how long srun waits for the others. A crash ends the job then; a stop takes seconds.
_WAIT_SECONDS = 120

# Behind srun in the batch script. Of a cancelled job the state is not RUNNING, so that it is not queued again.
_REQUEUE = """code=$?
case "$code" in {codes})
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ] &&
     [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    echo "plmtune: stopped by a signal; job $SLURM_JOB_ID is queued again, and resumes"
    scontrol requeue "$SLURM_JOB_ID"
  fi
esac
exit "$code\""""


def refuse_without_slurm() -> None:
    """Refuse a machine that cannot submit.

    Raises:
        UserError: if Slurm's commands or submitit are missing.
    """
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise UserError(
                f"Slurm is not installed here: there is no {program} on the PATH. Give the command on a login node of "
                "the cluster, or start the processes on this machine: plmtune launch local"
            )
    if not installed("submitit"):
        raise missing("submitit", "plmtune launch slurm")


def minutes_of(text: str, flag: str) -> int:
    """Minutes of a duration such as 8h, 90m, 1d12h."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text.strip())
    days, hours, minutes = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = (days * 24 + hours) * 60 + minutes
    if total == 0:
        raise UserError(f"{flag} {text:.40}: must be a time such as 90m, 8h or 1d12h.")
    return total


def settings_of(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of sbatch from ``KEY=VALUE`` or ``KEY``."""
    found: dict[str, Any] = {}
    for text in texts:
        key, given, value = text.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            raise UserError(f"--sbatch {text:.80}: write an option of sbatch as KEY=VALUE, such as reservation=night.")
        found[key] = value if given else True
    return found


def submit(
    command: Sequence[str],
    run_dir: Path,
    *,
    name: str,
    nodes: int,
    processes: int,
    minutes: int,
    stop_before: int = 2,
    requeues: int = 100,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    gpus: bool = False,
    cpus: int | None = None,
    memory_gb: float | None = None,
    setup: Sequence[str] = (),
    sbatch: dict[str, Any] | None = None,
) -> str:
    """Submit ``plmtune COMMAND`` as a job of several processes, and return the number of the job.

    The job runs the command itself: nothing is pickled. Its script, and the output of each rank as
    JOB_RANK_log.out, are in RUN_DIR/ranks. The command must resume the run that is in `run_dir`, if one is.

    Args:
        name: of the job.
        processes: of all nodes together, equally many on each.
        minutes: the time limit.
        stop_before: minutes before the time limit at which Slurm sends SIGUSR1; the run saves, ends, and is requeued.
        requeues: how often a stopped job is queued again.
        gpus: request a GPU for each process.
        cpus: CPU cores of each process.
        memory_gb: memory of each node.
        setup: shell commands before the processes start, such as ``module load cuda``.
        sbatch: further options of sbatch.
    """
    from submitit import SlurmExecutor

    logs = run_dir / "ranks"
    logs.mkdir(parents=True, exist_ok=True)
    executor = SlurmExecutor(folder=logs)
    settings = {
        "partition": partition,
        "account": account,
        "qos": qos,
        "gpus_per_node": processes // nodes if gpus else None,
        "cpus_per_task": cpus,
        "mem": f"{round(memory_gb * 1024)}M" if memory_gb else None,
    }
    # srun ends the others 120 s after a crash. At once would be wrong: stopped ranks do not all end at the same time.
    srun = ["--kill-on-bad-exit=0", f"--wait={_WAIT_SECONDS}"]
    srun += [f"--cpus-per-task={cpus}"] if cpus else []  # since Slurm 22.05 srun does not take it from sbatch
    requeue = _REQUEUE.format(codes="|".join(map(str, _STOPPED)), requeues=requeues)
    executor.update_parameters(
        job_name=name,
        time=minutes,
        nodes=nodes,
        ntasks_per_node=processes // nodes,
        stderr_to_stdout=True,
        srun_args=srun,
        **{key: value for key, value in settings.items() if value is not None},
        # bash must outlive a signal to the whole job, to queue it again. A trap, unlike "ignore", is not inherited.
        setup=[*setup, "trap : TERM USR1"],
        teardown=requeue.splitlines(),
        additional_parameters={
            "signal": f"USR1@{stop_before * 60}",  # submitit's USR2 is for its own handler
            "requeue": True,
            **(sbatch or {}),
        },
    )
    words = [sys.executable, "-u", "-m", "plmtune.launch.slurm_task", *command]
    with _said_by_sbatch():
        # Of submitit's two ways to run a command this one keeps the output unbuffered and reaches it with signals.
        return str(executor._submit_command(shlex.join(words)).job_id)


@contextlib.contextmanager
def _said_by_sbatch() -> Iterator[None]:
    """Turn what sbatch refuses into a sentence."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        yield
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        said = [line.strip() for line in str(text).splitlines() if "error" in line.lower()] or [str(text).strip()]
        raise UserError(f"Slurm refused the job: {'; '.join(said):.500}") from error
