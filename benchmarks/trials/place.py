"""A place in which runs are started as a person starts them, and what such a run came to."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import xxhash

from plmtune.cli import main as plmtune
from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.io.manifest import step_path, steps
from plmtune.io.metrics import read, without_timing
from plmtune.io.run_directory import read_record
from plmtune.training.trainer_state import latest_valid

STEPS = 24
SMALL = [
    "model=plm_tiny",
    "tokenizer=byte",
    "data=files",
    "data.paths=[corpus]",
    "optimizer=adamw",
    "scheduler=wsdc",
    "runtime.precision=fp32",
    "logger=jsonl",
    "seq_len=32",
    "global_batch_size=4",
    "micro_batch_size=2",
    f"phases=[{{name: main, steps: {STEPS}}}]",
    "log_every=1",
    "validation={every: 6, tokens: 500}",
    "checkpoint={every: 3, keep: 2}",
    "sample.max_new_tokens=0",
]

# Sums must not depend on how many threads share them, and a process that has threads cannot be forked.
os.environ["OMP_NUM_THREADS"] = "1"
FORKS = multiprocessing.get_context("forkserver")
# A process that has imported torch and waits to be forked: 200 starts take a minute, not an hour.
FORKS.set_forkserver_preload(["plmtune.recipes.pretrain", "plmtune.training.plot"])


class Job:
    """A process that was started, with its output in a file."""

    def __init__(self, process: BaseProcess | subprocess.Popen[bytes], output: Path) -> None:
        self._process = process
        self._output = output
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def wait(self, seconds: float = 300) -> int:
        """The exit code.

        Raises:
            TimeoutError: if it does not end; it is then killed.
        """
        if not until(lambda: self.poll() is not None, seconds):
            self.send(9)
            raise TimeoutError(f"process {self.pid} did not end in {seconds:.0f} seconds:\n{self.said()}")
        code = self.poll()
        assert code is not None
        return code

    def send(self, signal: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal)

    def until(self, true: Callable[[], bool]) -> bool:
        """Wait until something is true or the process has ended; returns whether it still runs."""
        until(lambda: true() or self.poll() is not None)
        return self.poll() is None

    def said(self) -> str:
        """All that it has written to stdout and stderr."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""


class Place:
    """A directory with a corpus of 40 documents, made at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = 0
        self._whole: dict[tuple[str, ...], Path] = {}
        (path / "corpus").mkdir(parents=True)
        for index, document in enumerate(documents()):
            (path / "corpus" / f"{index:02}.txt").write_text(document, encoding="utf-8")

    def start(self, *arguments: str, fork: bool = True, processes: int = 1) -> Job:
        """Start ``plmtune ARGUMENTS``, under torchrun for several processes.

        Args:
            fork: one process is forked from another that has imported everything, and is no new interpreter.
        """
        self._started += 1
        output = self.path / f"output-{self._started}.txt"
        if processes == 1 and fork:
            process = FORKS.Process(target=_as_plmtune, args=(arguments, str(self.path), str(output)), daemon=True)
            process.start()
            return Job(process, output)
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "plmtune", *arguments]
        with output.open("wb") as file:
            return Job(subprocess.Popen(command, cwd=self.path, stdout=file, stderr=file), output)

    def run(self, *arguments: str, fork: bool = True, processes: int = 1) -> tuple[int, str]:
        """The exit code and the output of a command."""
        job = self.start(*arguments, fork=fork, processes=processes)
        return job.wait(), job.said()

    def whole(self, *overrides: str, processes: int = 1) -> Path:
        """The run of these overrides that nothing disturbed, made when first asked for.

        Raises:
            RuntimeError: if it fails.
        """
        key = (*overrides, str(processes))
        if key not in self._whole:
            name = f"undisturbed-{len(self._whole)}"
            code, said = self.run("run", "pretrain", *SMALL, *overrides, f"run_dir={name}", processes=processes)
            if code != 0:
                raise RuntimeError(f"the undisturbed run ended with {code}:\n{said}")
            self._whole[key] = self.path / name
        return self._whole[key]


def documents() -> list[str]:
    """Forty texts from what every Python has."""
    with contextlib.redirect_stdout(None):  # it prints itself
        import this

    zen = "".join(this.d.get(character, character) for character in this.s)
    return [f"{number}. {zen}" for number in range(40)]


def _as_plmtune(arguments: tuple[str, ...], directory: str, output: str) -> None:
    """In a fork: what ``plmtune ARGUMENTS`` does in a new interpreter."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(directory)
    sys.argv = ["plmtune", *arguments]
    plmtune()


def until(true: Callable[[], bool], seconds: float = 120) -> bool:
    """Wait until something is true; returns whether it came true."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def last_step(run: Path) -> int:
    """The step of the last whole line of a run's metrics; 0 if there is none."""
    path = run / "metrics.jsonl"
    entries = read(path) if path.is_file() else []
    return int(entries[-1]["step"]) if entries else 0


def reach(job: Job, run: Path, step: int) -> bool:
    """Wait until a run's metrics reach `step`; returns whether it still runs then."""
    return job.until(lambda: last_step(run) >= step)


def attempts(run: Path) -> int:
    """How many processes have begun to run it."""
    return len(read_record(run).get("attempts", []))


def outcome(run: Path) -> dict[str, str]:
    """Hashes of all that must be equal in two runs of one config, of the newest checkpoint that is whole."""
    newest = latest_valid(run / "checkpoints")
    if newest is None:
        return {"checkpoint": "none"}
    document = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    metrics = [without_timing(entry) for entry in read(run / "metrics.jsonl")]
    return {
        "checkpoint": newest.name,
        "parameters": _digest(*sorted(newest.glob("model*.safetensors"))),
        "moments": _digest(*sorted(newest.glob("optimizer*.safetensors"))),
        "random generators": json.dumps(document["random"]),
        "schedule": json.dumps(document["scheduler"]),
        "order of the data": str(document["state"]["order"]),
        "metrics": json.dumps(metrics),
    }


def differing(run: Path, expected: dict[str, str]) -> list[str]:
    """Complaints about what is not as in the undisturbed run, and about what was left behind."""
    try:
        found = outcome(run)
    except UserError as error:
        return [str(error)]
    complaints = [f"{name} differ" for name in expected if found.get(name) != expected[name]]
    status = read_record(run).get("status")
    if status != "finished":
        complaints.append(f"run.json says {status}, not finished")
    return [*complaints, *left_behind(run)]


def left_behind(run: Path) -> list[str]:
    """Complaints about anything half-finished among a run's files."""
    stray = [path for directory in (run, run / "checkpoints") for path in directory.glob(".*")]
    return [f"{path.name} was left behind" for path in stray]


def torn(checkpoints: Path) -> list[str]:
    """Complaints about checkpoints that have their name and are not whole."""
    complaints = []
    for step in steps(checkpoints):
        try:
            manifest.check_files(step_path(checkpoints, step))
        except UserError as error:
            complaints.append(f"torn under its own name: {error}")
    return complaints


def newest_step(run: Path) -> int:
    return max(steps(run / "checkpoints"), default=0)


def _digest(*paths: Path) -> str:
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
