"""How an override is typed: the one place that writes ``key=value`` so that a shell and Hydra read what is meant."""

from __future__ import annotations

import re
import shlex
from typing import Any

# Texts that Hydra reads as they are: no number, no word of its grammar, no character that divides or quotes.
_BARE = re.compile(r"(?!(?:null|true|false|nan|inf)$)(?:[A-Za-z_]|\.{0,2}/)[\w./@%+-]*", re.ASCII | re.IGNORECASE)


def quote_override(key: str, value: Any) -> str:
    """Return an override as it is typed in a POSIX shell or zsh, so that Hydra reads exactly this value."""
    return shlex.quote(f"{key}={hydra_literal(value)}")


def hydra_literal(value: Any) -> str:
    """Write a plain value in the grammar of Hydra's overrides; a text is quoted where it could be read otherwise."""
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
