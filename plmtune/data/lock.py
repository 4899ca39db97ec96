"""A lock against other processes, waited for without a limit."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path, purpose: str) -> Iterator[None]:
    """Hold the file against other processes; the system lets go when the process ends, however it ends.

    Args:
        purpose: what the holder does, for the message of one that waits: "prepares ...".

    Raises:
        OSError: if the file cannot be written.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger(__name__).warning("waiting for another process that %s", purpose)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
