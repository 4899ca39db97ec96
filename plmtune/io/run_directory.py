"""A run directory: who is running in it, with what, and everything the run leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import xxhash

from plmtune.errors import UserError, unreadable
from plmtune.io import manifest
from plmtune.io.lock import is_at
from plmtune.io.provenance import git_state, now, versions
from plmtune.io.signals import EXIT_STOPPED
from plmtune.io.untrusted import load_json

Status = Literal["running", "finished", "stopped", "failed"]  # as run.json says it
State = Literal["running", "finished", "stopped", "failed", "killed"]  # killed: run.json says running, and nobody is

CONFIG = "config.yaml"
RECORD = "run.json"
LOCK = "lock"
# Links in runs/NAME: the run there that finished last, and the one that was started last.
LATEST, NEWEST = "latest", "newest"
_OF_MODELS = ("*.safetensors", "config.json", "adapter_config.json")  # patterns of files that a model directory has
_LOCK_TRIES, _LOCK_PAUSE = 10, 0.03
_PACKAGES = ("plmtune", "torch", "torchao", "hydra-core", "numpy", "safetensors", "tokenizers")


def read_record(path: Path) -> dict[str, Any]:
    """What run.json of the run at `path` says; empty if there is none or it is damaged."""
    try:
        entry = load_json((path / RECORD).read_text(encoding="utf-8"))
    except PermissionError as error:
        raise unreadable(path / RECORD, error) from error
    except (OSError, ValueError):
        return {}
    return entry if isinstance(entry, dict) else {}


def started_recipe(record: Mapping[str, Any]) -> str | None:
    """Return the recipe file that a run was started with, or None for a built-in recipe."""
    command = [str(word) for word in record.get("command") or []]
    words = command[2:] if command[1:2] == ["run"] else []
    return next((word for word in words if word.endswith(".py") and "=" not in word), None)


def resume_command(path: Path) -> str:
    """Return the command that resumes the run at `path`, with its recipe file."""
    recipe = started_recipe(read_record(path))
    return shlex.join(["plmtune", "resume", str(path), *(["--recipe", recipe] if recipe else [])])


def verify_config(path: Path) -> bool:
    """Whether run.json says that config.yaml is what the run at `path` began with; UserError if it names another.

    A run.json that is missing, damaged or of an older version says nothing.
    """
    expected = read_record(path).get("config")
    if expected is None:
        return False
    actual = manifest.digest(path / CONFIG)
    if actual != expected:
        raise UserError(
            f"{path / CONFIG} is not what the run began with: xxh3 {actual}, and {RECORD} says {expected}. Put it "
            f"back: resume takes changes as plmtune resume {path} KEY=VALUE, and for what a run learns, start a new "
            f"one with init_from={path}. Is it {RECORD} that was changed? Remove it: the checkpoints know the config."
        )
    return True


def refuse_if_in_use(path: Path) -> None:
    """Refuse a directory in which another process runs, long before this one could take the lock."""
    if holder := _lock_holder(path):
        raise _in_use(path, holder)


def _lock_holder(path: Path) -> str:
    """The process that holds the lock of the run at `path`; empty if there is none, or none that can be seen."""
    try:
        file = (path / LOCK).open("r", encoding="utf-8")
    except OSError:
        return ""  # no run was here, or none that can be seen: taking the lock will tell
    with file:
        try:
            # Shared, so that two that look do not see each other; whoever takes it for good tries more than once.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
        except OSError:
            pass  # a file system without locks
    return ""


def state_of(path: Path) -> State | None:
    """How it stands with the run at `path`; None if nothing says so."""
    if _lock_holder(path):
        return "running"
    status = read_record(path).get("status")
    return "killed" if status == "running" else status if status in ("finished", "stopped", "failed") else None


def resolve_link(path: Path) -> Path:
    """The run that a link such as runs/NAME/newest names: while a run trains, the link may come to name another."""
    return path.parent / path.readlink() if path.is_symlink() else path


def _point(run: Path, name: str) -> None:
    """Let runs/NAME/`name` be a link to a run in runs/NAME; without links (some file systems) there is none."""
    folder = run.absolute().parent
    if folder.parent.name != "runs":
        return  # a place that a person named
    temporary = folder / f".{name}-{os.getpid()}"
    try:
        temporary.symlink_to(run.name)
        temporary.replace(folder / name)
    except OSError:
        temporary.unlink(missing_ok=True)


def refuse_unusable(path: Path) -> None:
    """Refuse a directory in which no new run can begin, before anything is made."""
    if (path / CONFIG).exists():
        raise UserError(f"{path} already holds a run. Resume it (plmtune resume {path}), or choose another directory.")
    if model := next((name for pattern in _OF_MODELS for name in path.glob(pattern)), None):
        raise UserError(f"{path} holds a model ({model.name}), and a run would overwrite it. Choose another directory.")
    if any((path / "checkpoints").glob("step-*")):
        raise UserError(f"{path} holds checkpoints of a run without its {CONFIG}. Choose another directory.")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise _unusable(path, OSError(0, f"{there} cannot be written" if there.is_dir() else f"{there} is a file"))


class RunDirectory(contextlib.AbstractContextManager["RunDirectory"]):
    """One run's directory, locked against a second process while it is open.

    Made by `create` or `open`; `close` (or the end of a ``with`` block) releases the lock. The kernel releases that of
    a process that dies. Ranks other than 0 have no lock, and do not write (`is_main`).
    """

    def __init__(self, path: Path, lock: IO[str] | None = None) -> None:
        self.path = path
        self.is_main = lock is not None
        self._lock = lock
        self._saved = 0  # the newest step that `note_saved` has noted

    @classmethod
    def create(
        cls, path: str | Path, config_yaml: str, command: Sequence[str], *, data: Mapping[str, str] = {}, job: str = ""
    ) -> RunDirectory:
        """Start a run in `path`, which must not hold one yet.

        `data` are fingerprints by name; for `job` see `plmtune.training.resume_checks.torchrun_job_id`.
        """
        path = Path(path)
        made = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            refuse_unusable(path)
        except UserError:
            lock.close()
            raise
        run = cls(path, lock)
        try:
            run.update(
                command=list(command),
                directory=str(Path.cwd()),
                started=now(),
                versions=versions(_PACKAGES),
                git=git_state(),
                data=dict(data),
                config=xxhash.xxh3_128_hexdigest(config_yaml.encode()),
                job=job,
            )
            run.begin()
            # Last: a directory without it is no run, and another can be started in it.
            manifest.write_text(path / CONFIG, config_yaml)
        except OSError as error:
            for name in (CONFIG, RECORD, LOCK):
                (path / name).unlink(missing_ok=True)
            if made:
                path.rmdir()
            run.close()
            raise _unusable(path, error) from error
        _point(path, NEWEST)
        return run

    @classmethod
    def open(cls, path: str | Path, **notes: Any) -> RunDirectory:
        """Resume the run in `path`; `notes`: what this attempt changes, for run.json."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} holds no run: it has no {CONFIG}. Start one with plmtune run.")
        try:
            run = cls(path, _take_lock(path))
            run.begin(**notes)
        except OSError as error:
            raise _unusable(path, error) from error
        return run

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def record(self) -> dict[str, Any]:
        return read_record(self.path)

    def update(self, **entries: Any) -> None:
        """Change entries of run.json, in one step."""
        if self.is_main:
            text = json.dumps({**self.record(), **entries}, indent=1, sort_keys=True)
            manifest.write_text(self.path / RECORD, text + "\n")

    def begin(self, **notes: Any) -> None:
        """Note that this process is running it now: the newest of the attempts in run.json."""
        for path in self.path.glob(".*.tmp-*"):  # the lock is held: what is half-written here is a dead process's
            path.unlink(missing_ok=True)
        attempt = {"began": now(), "pid": os.getpid(), "host": socket.gethostname(), **notes}
        self.update(status="running", ended=None, reason=None, attempts=[*self._attempts(), attempt])

    def note(self, **entries: Any) -> None:
        """Add to what run.json says of this attempt."""
        *before, last = self._attempts() or [{}]
        self.update(attempts=[*before, {**last, **entries}])

    def note_saved(self, step: int) -> None:
        """Note the newest step that has a checkpoint. Where the checkpoints are lost later, a resume says so."""
        if step and step != self._saved:
            self._saved = step
            self.note(saved=step)

    def _attempts(self) -> list[dict[str, Any]]:
        attempts = self.record().get("attempts")
        return attempts if isinstance(attempts, list) else []

    def finish(self, status: Status, reason: str | None = None) -> None:
        """Note how the run ended, and why where it failed."""
        if self.is_main:
            self.note(ended=now())
            self.update(status=status, ended=now(), reason=reason)
            if status == "finished":
                _point(self.path, LATEST)

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        try:
            if self._lock is not None and self.record().get("status") == "running":
                stopped = isinstance(error, SystemExit) and error.code == EXIT_STOPPED
                self.finish("finished" if kind is None else "stopped" if stopped else "failed", _reason(error))
        except OSError:
            if kind is None:  # else that error is the one to hear of
                raise
        finally:
            self.close()


def _reason(error: BaseException | None) -> str | None:
    if error is None or isinstance(error, SystemExit):
        return None
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".rstrip(": ")


def _take_lock(path: Path) -> IO[str]:
    tries = 0
    while True:
        file = (path / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(file, path / LOCK):
                break
            file.close()  # a run that could not begin has removed it in between
        except BlockingIOError as error:
            with file:
                tries += 1
                if tries == _LOCK_TRIES:
                    file.seek(0)
                    raise _in_use(path, file.read().strip() or "another process") from error
            time.sleep(_LOCK_PAUSE)  # perhaps one that only looks (refuse_if_in_use) holds it, for a moment
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _in_use(path: Path, holder: str) -> UserError:
    return UserError(f"{path} is in use by {holder}. Stop that run, or choose another directory.")


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be used as a run directory: {error.strerror or error}.")
