"""Files that are replaced in one step: a reader sees the old one or the new one, never half of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from plmtune.errors import UserError
from plmtune.units import show_bytes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, which takes its place at the end; after an error nothing is left."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is told to a file that is open, without its name
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """As `replacing`, for a file that a person named: what stands in the way is a UserError."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Let `folder` be made, with those above it; afterwards remove what is new of these and empty."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        for place in new:
            with suppress(OSError):  # not empty, or not made
                place.rmdir()


def check_room(path: Path, num_bytes: int) -> None:
    """Raise UserError where the disk of a path, which need not be there yet, has no room for so many bytes."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise UserError(f"{path} needs {show_bytes(num_bytes)}, and its disk has {show_bytes(free)} left.")
