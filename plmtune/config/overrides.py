"""Writes overrides, ``key=value``, so that a shell and Hydra read the intended value."""

from __future__ import annotations

import re
import shlex
from typing import Any

# Texts that need no quotes in Hydra's grammar.
_BARE = re.compile(r"(?!(?:null|true|false|nan|inf)$)(?:[A-Za-z_]|\.{0,2}/)[\w./@%+-]*", re.ASCII | re.IGNORECASE)


def quote_override(key: str, value: Any) -> str:
    """Return an override, quoted for a POSIX shell or zsh, from which Hydra reads exactly this value."""
    return shlex.quote(f"{key}={hydra_literal(value)}")


def hydra_literal(value: Any) -> str:
    """Write a plain value in the grammar of Hydra's overrides; a text is quoted if it is ambiguous."""
    if isinstance(value, str):
        if _BARE.fullmatch(value):
            return value
        # Backslashes stand for themselves but before a quote.
        return '"' + re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {hydra_literal(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(hydra_literal, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
