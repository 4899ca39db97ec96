"""decode.c as a library: compiled once a machine and version, kept in a folder of the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from plmtune.io.atomic import atomic_write

SOURCE = Path(__file__).with_name("decode.c")
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120  # that a compiler may take


def unavailable() -> str | None:
    """Why there is no library, as a sentence; None: there is."""
    for name, value in (("PLMTUNE_NATIVE", "0"), ("PLMTUNE_KERNELS", "reference")):
        if os.environ.get(name) == value:
            return f"{name}={value} is set."
    found = _open()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The library; only where nothing is missing."""
    found = _open()
    assert not isinstance(found, str), found
    return found


@functools.cache
def _open() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if sys.platform != "linux":
        return "it is made for Linux alone, where torch and compilers share one library of threads."
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return f"there is no C compiler {os.environ.get('CC') or 'cc'!r} on the PATH."
    try:
        path = _path(compiler)
        if not path.exists():
            _compile(compiler, path)
        try:
            return _load(path)
        except (OSError, AttributeError):  # damaged, or another system's
            _compile(compiler, path)
            return _load(path)
    except subprocess.CalledProcessError as error:
        return f"{compiler} does not compile decode.c: {(error.stderr or '').strip()[:500]}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"decode.c could not be compiled and opened: {error}."


def _command(compiler: str) -> list[str]:
    processor = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [compiler, *_FLAGS, processor]


def _path(compiler: str) -> Path:
    """Where the library of this source, compiler and processor is kept."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_SECONDS, check=True).stdout
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        lines = sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        lines = [platform.processor()]
    parts = [SOURCE.read_bytes(), version, *(part.encode() for part in (*_command(compiler), *lines))]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "plmtune" / f"native-{name}.so"


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        command = [*_command(compiler), "-o", str(temporary), str(SOURCE), "-lm"]
        subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True, text=True, errors="replace")


def _load(path: Path) -> ctypes.CDLL:
    # torch has opened its library of threads under the name that this one asks for, so that there is but one pool.
    torch.get_num_threads()
    found = ctypes.CDLL(str(path))
    for name in ("plmtune_decode", "plmtune_product", "plmtune_round"):
        getattr(found, name).restype = ctypes.c_int
    found.plmtune_rows.restype = None
    return found
