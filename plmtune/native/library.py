"""decode.c as a library: compiled once for each machine and version, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from plmtune.io.atomic import atomic_write, user_cache
from plmtune.native.structs import Layer, Matrix, Model, Vector

SOURCE = Path(__file__).with_name("decode.c")
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120  # that a compiler may take


def is_disabled() -> str | None:
    """The environment setting that switches native decoding off, as NAME=VALUE; None: there is none."""
    for name, value in (("PLMTUNE_NATIVE", "0"), ("PLMTUNE_KERNELS", "reference")):
        if os.environ.get(name) == value:
            return f"{name}={value}"
    return None


def unavailable() -> str | None:
    """Why there is no library, as a sentence; None: there is one."""
    if setting := is_disabled():
        return f"{setting} is set."
    found = _open()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The library; only where `unavailable` is None."""
    found = _open()
    assert not isinstance(found, str), found
    return found


@functools.cache
def _open() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if sys.platform != "linux":
        return "it needs Linux, where torch and compilers share one OpenMP library."
    named = os.environ.get("CC") or "cc"
    try:
        compiler = shlex.split(named)
    except ValueError as error:
        return f"CC={named} cannot be read: {error}."
    if not compiler or shutil.which(compiler[0]) is None:
        return f"there is no C compiler {named!r} on the PATH."
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
        return f"{named} does not compile decode.c: {(error.stderr or '').strip()[:500]}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"decode.c could not be compiled and opened: {error}."


def _command(compiler: Sequence[str]) -> list[str]:
    processor = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [*compiler, *_FLAGS, processor]


def _path(compiler: Sequence[str]) -> Path:
    """Where the library of this source, compiler and processor is kept."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_SECONDS, check=True).stdout
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        lines = sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        lines = [platform.processor()]
    parts = [SOURCE.read_bytes(), version, *(part.encode() for part in (*_command(compiler), *lines))]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    return user_cache() / f"native-{name}.so"


def _compile(compiler: Sequence[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        command = [*_command(compiler), "-o", str(temporary), str(SOURCE), "-lm"]
        subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True, text=True, errors="replace")


def _load(path: Path) -> ctypes.CDLL:
    # torch loads its OpenMP library under the name that this one asks for, so that both share one pool of threads.
    torch.get_num_threads()
    found = ctypes.CDLL(str(path))
    for name in ("plmtune_decode", "plmtune_product", "plmtune_round"):
        getattr(found, name).restype = ctypes.c_int
    found.plmtune_rows.restype = found.plmtune_sizes.restype = None
    sizes = (ctypes.c_int64 * 4)()
    found.plmtune_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(kind) for kind in (Vector, Matrix, Layer, Model)]:
        raise OSError(f"its structures have {list(sizes)} bytes, which are not those of structs.py")
    return found
