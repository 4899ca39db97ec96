"""A cluster of Slurm with one node, this machine: munged, slurmctld and slurmd, all in one directory."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")

# Two partitions with the same node: a job of "urgent" preempts one of "normal", which has 20 seconds to save.
CONF = """
ClusterName=plmtune
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=600
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=normal Nodes={host} Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=urgent Nodes={host} MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if _which(name) is None]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def cluster(place: Path) -> Iterator[dict[str, str]]:
    """Start the daemons with all their files in `place`; yields the environment of a user, and ends them."""
    place.mkdir(parents=True, exist_ok=True)
    for name in ("munge", "state", "spool"):
        (place / name).mkdir(mode=0o755)
    host, user = socket.gethostname().partition(".")[0], _user()
    conf = CONF.format(host=host, user=user, place=place, port=_free_port(), node_port=_free_port())
    (place / "slurm.conf").write_text(conf)
    key = place / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    munge = {"key-file": key, "socket": place / "munge/socket", "pid-file": place / "munge/pid",
             "log-file": place / "munge/log", "seed-file": place / "munge/seed"}  # fmt: skip
    environment = {**os.environ, "SLURM_CONF": str(place / "slurm.conf")}
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *options: str) -> None:
        program = _which(name)
        assert program is not None
        # A daemon ends with this process, however this process ends.
        bound = ["setpriv", "--pdeathsig", "TERM", "--"] if _which("setpriv") else []
        with (place / f"{name}.out").open("wb") as output:
            command = [*bound, program, *options]
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))

    try:
        start("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        _wait(lambda: (place / "munge/socket").exists(), 10, "munged")
        start("slurmctld", "-D", "-i", "-c")
        start("slurmd", "-D", "-N", host)
        _wait(lambda: b"idle" in _output(environment, "sinfo", "--noheader", "--format=%T"), 60, "slurmd")
        yield environment
    finally:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", "--user", user], env=environment, capture_output=True, timeout=10, check=False)
            _wait(lambda: not _output(environment, "squeue", "--noheader"), 20, "scancel")
        for daemon in reversed(started):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _output(environment: dict[str, str], *command: str) -> bytes:
    return subprocess.run(command, env=environment, capture_output=True, timeout=20, check=False).stdout


def _wait(done: object, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not answer in {seconds:g} seconds")
        time.sleep(0.2)


if __name__ == "__main__":  # a cluster to try by hand: python tests/launch/slurm_cluster.py DIRECTORY
    import sys

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with cluster(Path(sys.argv[1]).absolute()) as made:
        print(f"export SLURM_CONF={made['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
