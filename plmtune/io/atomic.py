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
def atomic_write(path: Path, *, user_error: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`, which replaces `path` at the end; after an error it is removed.

    With `user_error`, for files that a person named, an OSError is raised as a UserError that names `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if user_error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
        error.filename = error.filename or str(path)  # writing to an open file on a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def user_cache() -> Path:
    """The folder for what this program can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "plmtune"


def write_atomically(path: Path, text: str, *, user_error: bool = False) -> None:
    """Write a text in UTF-8, see `atomic_write`."""
    with atomic_write(path, user_error=user_error) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def remove_empty_folders(folder: Path) -> Iterator[None]:
    """On exit remove `folder` and those above it that were created inside the block and are empty."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        for place in new:
            with suppress(OSError):  # not empty, or never created
                place.rmdir()


def check_room(path: Path, num_bytes: int, remedy: str = "") -> None:
    """Raise UserError where the disk of a path, which need not exist yet, has no room for so many bytes."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise UserError(f"{path} needs {show_bytes(num_bytes)}, and its disk has {show_bytes(free)} left.{remedy}")
