"""A file lock against other processes, without a timeout."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def exclusive(path: Path, purpose: str) -> Iterator[None]:
    """Lock a file against other processes, and remove it on exit. The system releases the lock of a process that dies.

    A process that waits says for what: `purpose` is "prepares ...".
    """
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger(__name__).warning("waiting for another process that %s", purpose)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        if is_at(file, path):
            break
        file.close()  # its holder has removed it, and another file may be there
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
