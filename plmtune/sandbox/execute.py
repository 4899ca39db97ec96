"""Run Python code of a model with its tests, isolated from this machine and for a limited time.

Code and tests run in user, mount, process, network and IPC namespaces of their own (`plmtune.sandbox.inside`): no
network, no process of this machine, no file but the Python installation, numpy, the system's libraries and a few
devices, read-only, and an empty working directory in memory. Memory, processor time, processes, files and output are
limited, and after the wall-clock limit the kernel ends all of it at once.

They run in one process and one module (`plmtune.sandbox.program`), as in the judges of HumanEval and lm-eval, so the
verdicts agree. The parent process gives the verdict, on a key and a nonce that the process has only after the tests
have ended. So code does not pass by ending early, by printing, by its exit status, or by writing to descriptors.

Limits of the protection: the kernel is shared. Code in the process of its tests defines the equality of its own
objects, can replace functions that the tests call, and can search the interpreter's frames and memory.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import marshal
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import IO, Any, Literal

from plmtune.errors import UserError
from plmtune.io.provenance import num_cores
from plmtune.ranges import Range, check
from plmtune.sandbox.uncalled import PARSER, with_calls

Isolation = Literal["namespaces", "limits"]
MEMORY_BYTES = 512 * 2**20
DISK_BYTES = 16 * 2**20

# The sandbox's programs import the standard library only, and are compiled once a process.
_LAUNCHER = ("plmtune.sandbox.program", "plmtune.sandbox.inside")
_START = """
import marshal, sys, types
with open(int(sys.argv[1]), "rb") as file:
    order = marshal.load(file)
for name, code in order["launcher"]:
    module = sys.modules[name] = types.ModuleType(name)
    exec(code, module.__dict__)
module.main(order, int(sys.argv[2]))
"""
_PACKAGES = "/packages"  # folder of numpy inside the sandbox
_STARTING = 30.0  # seconds for the start of the sandbox, beyond the code's own


class NoSandbox(UserError):
    """This machine cannot isolate; `what` says what is missing."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"Code that a model wrote is run in a sandbox only, and there is none on this machine: {what}. "
            "Choose a rule or a reward that runs no code, or a machine that has one."
        )


@dataclass(frozen=True)
class Result:
    """The result of running code.

    Attributes:
        passed: the tests ran to their end without an error.
        exit_code: as in `subprocess`; None after a timeout.
        output: the beginning of stdout and stderr.
        reason: why it did not pass.
    """

    passed: bool
    exit_code: int | None
    output: str
    reason: str | None


def run_python(
    code: str,
    *,
    tests: str = "",
    stdin: str = "",
    seconds: float = 5.0,
    memory_bytes: int = MEMORY_BYTES,
    disk_bytes: int = DISK_BYTES,
    output_bytes: int = 64 * 2**10,
    processes: int = 128,
    isolation: Isolation = "namespaces",
    stop: threading.Event | None = None,
) -> Result:
    """Run code, and then tests in the same module, with the standard library and numpy, where it is installed.

    Tests that are defined and never called are called; tests that cannot be are never passed.

    Args:
        seconds: of wall-clock time for code and tests together.
        memory_bytes: address space of a process.
        disk_bytes: size of the working directory, which is in memory.
        output_bytes: of stdout and stderr that are returned.
        processes: most processes and threads at once.
        stop: once set, the code is ended as after a timeout.
        isolation: "limits" uses neither namespaces nor `processes`, for trusted code: it has all rights of its user,
            can outlive its time in another session, and can change the verdict as root or where processes may trace
            each other. With "namespaces", NoSandbox says what this machine lacks.
    """
    check(Range(above=0), seconds=seconds, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    check(Range(above=0), output_bytes=output_bytes, processes=processes)
    if isolation == "namespaces" and platform.system() != "Linux":
        raise NoSandbox(f"it needs the namespaces of Linux, and this is {platform.system()}")
    called = with_calls(tests)
    if called.never is not None:
        return Result(False, None, "", f"its tests are never run: {called.never}")
    prefix, packages = os.path.realpath(sys.base_prefix), _numpy()
    # The executable itself, not a virtual environment's link to it.
    python = os.path.realpath(sys.executable)
    if not python.startswith(prefix + os.sep):
        python = f"{prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    spec = {
        "code": code,
        "tests": called.text,
        "seconds": seconds,
        "memory_bytes": memory_bytes,
        "disk_bytes": disk_bytes,
        "processes": processes,
        "isolated": isolation == "namespaces",
        "python": python,
        "prefix": prefix,
        "packages": {str(folder): f"{_PACKAGES}/{folder.name}" for folder in packages},
        "path": _PACKAGES if isolation == "namespaces" or not packages else str(packages[0].parent),
        "launcher": [(name, _compiled(name)) for name in _LAUNCHER],
        "program": _compiled("plmtune.sandbox.program"),
    }
    # Files, not pipes, which would block until they are read. The sandbox writes the report, not the code.
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as order, tempfile.TemporaryFile() as report:
        given.write(stdin.encode())
        given.seek(0)
        order.write(marshal.dumps(spec))
        order.seek(0)
        launcher = subprocess.Popen(
            [python, "-I", "-S", "-c", _START, str(order.fileno()), str(report.fileno())],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(order.fileno(), report.fileno()),
            env={},
            start_new_session=True,
        )
        try:
            output, in_time = _read(launcher, report, seconds, output_bytes, stop or threading.Event())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
            assert launcher.stdout
            launcher.stdout.close()
        report.seek(0)
        return _judge(_facts(report), output.decode(errors="replace"), in_time, seconds)


def _facts(report: Iterable[bytes]) -> dict[str, Any]:
    """What the sandbox has reported, a line at a time."""
    found: dict[str, Any] = {}
    for line in report:
        with PARSER:
            found |= ast.literal_eval(line.decode())
    return found


def run_all(
    work: Sequence[tuple[str, str]], *, seconds: float = 5.0, isolation: Isolation = "namespaces"
) -> list[Result]:
    """Run pairs of (code, tests), one a core at a time; the results are in the same order."""
    stop, pool = threading.Event(), ThreadPoolExecutor(num_cores())

    def run(pair: tuple[str, str]) -> Result:
        return run_python(pair[0], tests=pair[1], seconds=seconds, isolation=isolation, stop=stop)

    try:
        return list(pool.map(run, work))
    finally:
        stop.set()  # after an error or Ctrl-C; otherwise all have ended
        pool.shutdown(cancel_futures=True)


@functools.cache
def _compiled(name: str) -> CodeType:
    path = Path(__file__).with_name(name.rpartition(".")[2] + ".py")
    return compile(path.read_bytes(), f"sandbox/{path.name}", "exec", dont_inherit=True)


@functools.cache
def _numpy() -> list[Path]:
    """The folders of numpy, and of the libraries that its wheel brings; none where it is not installed."""
    found = importlib.util.find_spec("numpy")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()][:1] if found else []
    return [each for folder in folders for each in (folder, folder.with_name("numpy.libs")) if each.is_dir()]


def _read(
    launcher: subprocess.Popen[bytes], report: IO[bytes], seconds: float, limit: int, stop: threading.Event
) -> tuple[bytes, bool]:
    """(the output, up to a limit; whether the code ended in time)."""
    assert launcher.stdout
    kept = bytearray()
    deadline = time.monotonic() + seconds + _STARTING
    started = False
    with selectors.DefaultSelector() as selector:
        selector.register(launcher.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and not stop.is_set():
            if not started and os.fstat(report.fileno()).st_size:
                started, deadline = True, time.monotonic() + seconds
                continue
            if selector.select(min(left, 0.2 if started else 0.01)):
                piece = os.read(launcher.stdout.fileno(), 1 << 16)
                if not piece:
                    return bytes(kept), True
                kept += piece[: max(0, limit - len(kept))]
    return bytes(kept), False


def _judge(report: dict[str, Any], output: str, in_time: bool, seconds: float) -> Result:
    if "missing" in report:
        raise NoSandbox(report["missing"])
    *_, last = ["", *output.strip().splitlines()]
    if not report.get("ready"):
        raise NoSandbox(f"Python does not start there ({last or 'without any output'})")
    code: int | None = report.get("exit_code") if in_time else None
    reason = None
    if not in_time:
        reason = f"ran for more than {seconds:g} seconds"
    elif report.get("reason"):
        reason = report["reason"].encode(errors="backslashreplace").decode()
    elif code is None:
        reason = "was ended together with its sandbox"
    elif code < 0:
        reason = f"was ended by {signal.Signals(-code).name}"
    elif code:
        reason = last or f"ended with exit status {code}"
    elif not report["finished"]:
        reason = "ended before it came to its end, with exit status 0"
    return Result(reason is None, code, output, reason)
