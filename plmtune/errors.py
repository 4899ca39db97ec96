"""The one error that a person sees: a sentence that says what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake a person can mend. The command line prints it without a traceback and exits with code 2."""


class Unreadable(UserError):
    """The system does not give a file's bytes: nothing is known of what it holds, so it is not damaged."""


def unreadable(path: object, error: OSError) -> Unreadable:
    """The sentence for a file that the system refuses to read."""
    remedy = " Change its permissions, or run as its owner." if isinstance(error, PermissionError) else ""
    return Unreadable(f"{path} cannot be read: {error.strerror or error}.{remedy}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` for the nearest known name, or the list of all when nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not near:
        # lerning_rate -> lr: people spell out what the field abbreviates.
        parent, dot, leaf = name.rpartition(".")
        initials = parent + dot + "".join(part[:1] for part in leaf.split("_"))
        near = [initials] if initials in names else []
    if near:
        return f" Did you mean {near[0]}?"
    return f" Known: {', '.join(names)}." if names else ""
