"""Errors for users: sentences that name what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

_POINTER = b"version https://git-lfs.github.com/"


class UserError(Exception):
    """An error that the user can correct. The command line prints it without a traceback and exits with code 2."""


class Unreadable(UserError):
    """A file that the system refuses to read, which is not the same as a damaged one."""


class WeightsNotFinite(UserError):
    """Weights hold NaN or infinity. They are not saved."""


class LogitsNotFinite(ValueError):
    """A model's logits are NaN or infinite.

    Args:
        item: the key of the request, or the number of the first item of a batch, that they are for.
    """

    def __init__(self, item: str | int) -> None:
        super().__init__(f"item {item}: the model gives numbers that are NaN or infinite")
        self.item = item


def unreadable(path: object, error: OSError) -> Unreadable:
    """Return the error for a file that the system refuses to read."""
    remedy = " Change its permissions, or run as its owner." if isinstance(error, PermissionError) else ""
    return Unreadable(f"{path} cannot be read: {error.strerror or error}.{remedy}")


def refuse_pipe(path: Path) -> None:
    """Refuse a device or a pipe: reading it may block forever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a device or a pipe, which has no end or is read only once. Name a file")


def refuse_pointer(path: Path) -> None:
    """Refuse what Git leaves in place of a large file where Git LFS is not installed."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it there: git lfs pull")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` with up to three near names, nearest first, or the list of all when none is near."""
    names = sorted(known)
    if near := near_names(name, names):
        return f" Did you mean {either(near)}?"
    return f" Known: {', '.join(names)}." if names else ""


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the known names that `name` may stand for, nearest first."""
    names = sorted(known)
    parent, dot, leaf = name.rpartition(".")
    # Beginnings come first: temp is temperature, although system is more alike.
    if longer := [one for one in names if len(leaf) > 2 and one != name and one.startswith(name)]:
        return sorted(longer, key=len)[:3]
    if near := difflib.get_close_matches(name, names, n=3, cutoff=0.6):
        # Only names that are nearly as close as the closest.
        least = difflib.SequenceMatcher(None, near[0], name).ratio() - 0.12
        return [one for one in near if difflib.SequenceMatcher(None, one, name).ratio() >= least]
    initials = parent + dot + "".join(part[:1] for part in leaf.split("_"))  # learning_rate -> lr
    return [initials] if initials in names else []


def either(names: Sequence[str]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    return " or ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
