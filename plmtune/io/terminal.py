"""What a stream can show: the width and colours of a terminal, the characters of an encoding.

A pipe or a file has no width, so nothing is wrapped there, and gets no colours.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
import textwrap
from typing import Protocol, TextIO

from rich.cells import cell_len

_NARROWEST = 20
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32"}
# What stands for a character that the stream's encoding lacks.
_PLAIN = {
    "·": "|", "±": "+-", "…": "...", "—": "-", "─": "-", "→": "->", "↑": "^", "↓": "v", "█": "#", "×": "x",
    "≤": "<=", "≥": ">=", "⟦": "[[", "⟧": "]]",
}  # fmt: skip
# Untrusted text may hold control sequences that move the cursor, set the title or reverse the text direction.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# A command stays on one line, so that it can be copied. It ends with its sentence.
_COMMAND = re.compile(
    r"(?:(?<=: )|(?<=with )|(?<=: `))(?:plmtune|\S*python[\d.]* -m) .*?(?:\.(?= [A-Z])|$)|(?<=try it: ).*$"
    r"|\S*python[\d.]* -c \"[^\"]*\""
)


class StatusLine(Protocol):
    """A line at the bottom of the terminal, for which other output makes room."""

    def draw(self) -> None: ...

    def clear(self) -> None: ...


status: StatusLine | None = None  # what is drawn now, see `plmtune.io.progress`


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if "\u2800" <= character <= "\u28ff":  # the frames of rich's spinner
        return "*"
    return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()


codecs.register_error("plmtune", _replace)


def use_plain_characters() -> None:
    """Make the standard streams replace characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plmtune")


def columns(stream: TextIO) -> int | None:
    """Return the width of the terminal that `stream` writes to, or None where it is no terminal."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return max(int(given), _NARROWEST)
    try:
        return max(os.get_terminal_size(stream.fileno()).columns or 80, _NARROWEST)
    except (OSError, ValueError):  # an emulated terminal, as in an editor
        return 80


def in_place(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can draw over what it has written."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def coloured(stream: TextIO) -> bool:
    return in_place(stream) and not os.environ.get("NO_COLOR")


def style(text: str, name: str) -> str:
    """Return `text` between a terminal's codes for bold, dim, red or green."""
    return f"\033[{_STYLES[name]}m{text}\033[0m" if name and text else text


def encoding(stream: TextIO) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def encodable(text: str, encoding: str) -> str:
    """Return `text` in the characters that `encoding` has, so that its width can be measured."""
    return text.encode(encoding, "plmtune").decode(encoding)


def visible(text: str) -> str:
    """Return `text` with control characters escaped, except line ends and tabs."""
    return _CONTROL.sub(lambda found: _spelled(ord(found.group())), text)


def shown(text: str, stream: TextIO) -> str:
    """Return `text` as it is printed to `stream`: escaped on a terminal, unchanged on a pipe."""
    return visible(text) if stream.isatty() else text


def _spelled(character: int) -> str:
    return f"\\x{character:02x}" if character < 256 else f"\\u{character:04x}"


def wrap(text: str, width: int | None) -> list[str]:
    """Break lines at spaces; a continued line is indented by two more than the line it continues.

    A word that is longer than `width`, such as a path, and a command to copy stay whole. A comment of YAML stays one.
    """
    lines = text.split("\n")
    if width is None:
        return lines
    found = []
    for line in lines:
        if cell_len(line) <= width:
            found.append(line)
            continue
        indent, at = " " * (len(line) - len(line.lstrip()) + 2), 0
        begin = indent + "# " if "  # " in line else indent
        for command in [*_COMMAND.finditer(line), None]:
            prose = line[at : command.start() if command else None]
            found += textwrap.wrap(
                prose if at == 0 else prose.strip(),
                width,
                initial_indent=indent if at else "",
                subsequent_indent=begin,
                break_long_words=False,
                break_on_hyphens=False,
            )
            if command:
                found.append(indent + command.group())
                at = command.end()
    return found


def echo(text: str = "", *, err: bool = False) -> None:
    """Print prose to stdout or stderr, wrapped on a terminal, with control characters escaped."""
    stream = sys.stderr if err else sys.stdout
    lines = wrap(encodable(visible(text), encoding(stream)), columns(stream))
    line = status
    if line is not None:
        line.clear()
    print("\n".join(lines), file=stream, flush=True)
    if line is not None:
        line.draw()


def say(text: str) -> None:
    """Print prose to stderr."""
    echo(text, err=True)


class Warnings(logging.Handler):
    """Prints what is logged as `echo` prints prose."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            echo(self.format(record), err=True)
        except Exception:  # as in logging's own handlers
            self.handleError(record)
