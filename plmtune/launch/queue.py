"""How launched jobs stand in the queue, as ``squeue`` and ``sacct`` say. No torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from plmtune.launch.record import Launch

_TIMEOUT = 20  # seconds for an answer of Slurm's


def queue_states(launches: Mapping[Path, Launch]) -> dict[Path, str]:
    """A few words for each launch by Slurm: "job 7: queued (Priority)", "job 7: running on node[1-2]",
    "job 7: ended: timeout", or why it is unknown."""
    jobs = sorted({one.job for one in launches.values()})
    states, silent = _ask(jobs) if jobs else ({}, "")
    unknown = silent or "no longer in the queue"
    return {path: f"job {one.job}: {states.get(one.job, unknown)}" for path, one in launches.items()}


def _ask(jobs: Sequence[str]) -> tuple[dict[str, str], str]:
    """(words for each job that Slurm knows, what to say of the others)."""
    if shutil.which("squeue") is None:
        return {}, "unknown, there is no squeue here"
    lines, refused = _lines("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i|%T|%r|%N")
    states = {}
    for job, state, reason, nodes in (line.split("|") for line in lines if line.count("|") == 3):
        states[job] = _words(state, reason, nodes)
    left = [job for job in jobs if job not in states]
    if left and shutil.which("sacct") is not None:
        options = ("--noheader", "--parsable2", "--allocations", f"--jobs={','.join(left)}")
        for line in _lines("sacct", *options, "--format=JobID,State,NodeList")[0]:
            if line.count("|") == 2:
                job, state, nodes = line.split("|")
                states[job] = _words(state.partition(" ")[0], "", nodes)  # CANCELLED by 1000
    # It says "Invalid job id" of a job that ended long ago.
    unreachable = refused and "Invalid job id" not in refused
    return states, f"unknown, squeue says: {refused.splitlines()[-1]:.100}" if unreachable else ""


def _words(state: str, reason: str, nodes: str) -> str:
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"):
        return f"queued ({reason})" if reason not in ("", "None") else "queued"
    if state in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED"):
        return f"{state.lower()} on {nodes}" if nodes else state.lower()
    return f"ended: {state.lower().replace('_', ' ')}"


def _lines(*command: str) -> tuple[list[str], str]:
    """(lines of the output, what it said on stderr)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return [], f"no answer in {_TIMEOUT} seconds"
    return done.stdout.splitlines(), done.stderr.strip() if done.returncode else ""
