"""Start a command on several processes of this machine, by the agent that is behind torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import LaunchConfig, elastic_launch

from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.run_directory import read_record
from plmtune.io.signals import EXIT_STOPPED
from plmtune.units import show_number_of

# Signals that are sent on to the processes. torchrun's own list lacks SIGUSR1, which asks a run to save and stop.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# How long a run may take to finish its step and to save, after a signal. torchrun's own 30 seconds cut large saves off.
STOP_SECONDS = 600


def count_processes(asked: int | None) -> int:
    """How many processes to start: those asked for, or one a GPU.

    Raises:
        UserError: if nothing says how many, or if there are fewer GPUs.
    """
    gpus = torch.cuda.device_count()
    if asked is None and not gpus:
        raise UserError(
            "--processes is missing, and there is no GPU on this machine to count. Say how many processes to start: "
            "plmtune launch local --processes 2 run NAME"
        )
    return asked or gpus


def refuse_too_few_gpus(processes: int, device: str) -> None:
    """Refuse more processes than GPUs, where each process computes on a GPU of its own."""
    gpus = torch.cuda.device_count()
    if gpus and device != "cpu" and processes > gpus:
        raise UserError(
            f"--processes {processes}: this machine has {show_number_of(gpus, 'GPU')}, and each process computes on "
            "one of its own. Start fewer, or set runtime.device=cpu."
        )


def run_processes(command: Sequence[str], run_dir: Path, *, processes: int, max_restarts: int = 0) -> int:
    """Run ``plmtune COMMAND`` on each process, and return its exit code when all have ended.

    The output of rank 0 is shown. That of each rank is kept: RUN_DIR/ranks/ID/attempt_N/RANK/{stdout,stderr}.log.

    Args:
        command: the words behind plmtune.
        max_restarts: how often all processes are started anew after one has failed.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # says what is said below, in 30 lines
    # torchrun's default is 1, which leaves cores idle where there are more of them than processes.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(_cores()) // processes)))
    logs = run_dir / "ranks"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex[:8],
        role="",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port: several launches on one machine do not meet
        local_addr="localhost",
        max_restarts=max_restarts,
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL, tee={0: Std.ALL}),
        log_line_prefix_template="${role_name}",  # the role is empty, and so is the prefix
        signals_to_handle=SIGNALS,
        shutdown_timeout=STOP_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "plmtune", *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == EXIT_STOPPED:  # a signal to a worker alone
            return EXIT_STOPPED
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        terminal.say(f"plmtune: rank {rank} {how}, and the other ranks were ended. Output of all ranks: {logs}")
        return 128 - code if code < 0 else code
    except SignalException as error:
        ended = read_record(run_dir).get("status")
        return {"finished": 0, "stopped": EXIT_STOPPED}.get(str(ended), 128 + int(error.sigval))
    return 0


def _cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)
