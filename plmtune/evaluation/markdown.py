"""Values of configs and records in Markdown: they cannot leave their place, and links lead only to the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from plmtune.io.terminal import visible

HUB = "https://huggingface.co"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# Marks of writing direction can disguise a name.
_TURNS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# An escaping backslash, code, emphasis, tables; _ within a word has no meaning.
_SIGNS = re.compile(r"\\(?=[!-/:-@\[-`{-~])|[`*~|]|(?<!\w)_|_(?!\w)|(?<=\])[(\[:]")


class Markdown(str):
    """Text that is Markdown already."""


def _one_line(value: Any) -> str:
    text = visible(re.sub(r"\s+", " ", str(value)).strip())
    return _TURNS.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def escape(value: Any) -> Markdown:
    """Escape text so that it is shown as it is."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_SIGNS.sub(r"\\\g<0>", _one_line(value)).replace("<", "&lt;"))


def code(value: Any) -> Markdown:
    """Return text as code, also for cells of tables; as plain text if code cannot contain it."""
    text = _one_line(value)
    return escape(value) if not text or set(text) & {"`", "|"} or "](" in text else Markdown(f"`{text}`")


def hub_link(name: Any, revision: Any = None, *, dataset: bool = False) -> Markdown | None:
    """Return a link to a model or a dataset of the Hugging Face hub; None if `name` is no valid name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        return None
    page = f"{HUB}/{'datasets/' if dataset else ''}{name}"
    at = f"/tree/{quote(str(revision), safe='')}" if revision else ""
    return Markdown(f"[{escape(name)}]({page}{at})")


def show_component(settings: Mapping[str, Any]) -> str:
    given = show_settings({key: value for key, value in settings.items() if key != "component"})
    return f"{settings.get('component')}" + (f" ({given})" if given else "")


def show_settings(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {show_value(value)}" for key, value in given.items() if value is not None)


def show_value(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return f"({show_settings(value)})"
    if isinstance(value, list):
        return "[" + ", ".join(map(show_value, value)) + "]"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
