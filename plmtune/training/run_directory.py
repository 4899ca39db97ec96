"""A run directory: who is running in it, with what, and everything the run leaves behind."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from plmtune.errors import UserError
from plmtune.training.manifest import write_text

Status = Literal["running", "finished", "stopped", "failed"]

# The exit code of a run that a signal stopped after saving: it can be resumed (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75

CONFIG = "config.yaml"
RECORD = "run.json"
LOCK = "lock"
_PACKAGES = ("plmtune", "torch", "torchao", "hydra-core", "numpy", "safetensors", "tokenizers")


class RunDirectory:
    """One run's directory, locked against a second process while it is open.

    Made by `create` or `open`; `close` (or the end of a ``with`` block) gives the lock back. A process that
    dies gives it back too, as the kernel holds it. Ranks other than 0 neither lock nor write.

    Attributes:
        path: the directory.
        is_main: whether this process writes.
    """

    def __init__(self, path: Path, *, is_main: bool, lock: IO[str] | None) -> None:
        self.path = path
        self.is_main = is_main
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: str | Path,
        config_yaml: str,
        command: Sequence[str],
        *,
        data: Mapping[str, str] | None = None,
        is_main: bool = True,
    ) -> RunDirectory:
        """Start a run in `path`, which must not hold one yet.

        Args:
            config_yaml: the resolved configuration, as text.
            command: what was typed.
            data: fingerprints of the data by name.

        Raises:
            UserError: if the directory holds a run, is in use, or cannot be written.
        """
        path = Path(path)
        if not is_main:
            return cls(path, is_main=False, lock=None)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
            if (path / CONFIG).exists():
                lock.close()
                raise UserError(
                    f"{path} already holds a run. Go on with it (plmtune resume {path}), or choose another directory."
                )
            run = cls(path, is_main=True, lock=lock)
            run.update(
                command=list(command),
                directory=str(Path.cwd()),
                started=_now(),
                versions=_versions(),
                git=_git_state(),
                data=dict(data or {}),
            )
            write_text(path / CONFIG, config_yaml)
            run.begin()
        except OSError as error:
            raise UserError(f"{path} cannot be used as a run directory: {error.strerror or error}.") from error
        return run

    @classmethod
    def open(cls, path: str | Path, *, is_main: bool = True) -> RunDirectory:
        """Go on with the run in `path`.

        Raises:
            UserError: if there is no run, or another process is in it.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} holds no run: it has no {CONFIG}. Start one with plmtune run.")
        try:
            lock = _take_lock(path) if is_main else None
        except OSError as error:
            raise UserError(f"{path} cannot be used as a run directory: {error.strerror or error}.") from error
        run = cls(path, is_main=is_main, lock=lock)
        run.begin()
        return run

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def record(self) -> dict[str, Any]:
        """What run.json says; empty if there is none or it is not JSON."""
        try:
            entry = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return entry if isinstance(entry, dict) else {}

    def update(self, **entries: Any) -> None:
        """Change entries of run.json, in one step."""
        if self.is_main:
            write_text(self.path / RECORD, json.dumps({**self.record(), **entries}, indent=1, sort_keys=True) + "\n")

    def begin(self) -> None:
        """Note that this process is running it now."""
        if self.is_main:  # the lock is held: what is half-written here is a dead process's
            for path in self.path.glob(".*.tmp-*"):
                path.unlink(missing_ok=True)
        attempts = self.record().get("attempts", 0)
        self.update(status="running", pid=os.getpid(), host=socket.gethostname(), attempts=attempts + 1, ended=None)

    def finish(self, status: Status) -> None:
        """Note how the run ended."""
        self.update(status=status, ended=_now())

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None and self.record().get("status") == "running":
            stopped = isinstance(error, SystemExit) and error.code == EXIT_STOPPED
            self.finish("finished" if kind is None else "stopped" if stopped else "failed")
        self.close()


def _take_lock(path: Path) -> IO[str]:
    file = (path / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{path} is in use by {holder}. Stop that run, or choose another directory.") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the working directory's repository; None outside of one."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str:
        return subprocess.run([git, *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (subprocess.SubprocessError, OSError):
        return None
