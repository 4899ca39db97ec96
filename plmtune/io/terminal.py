"""What a stream can show: the width and colours of a terminal, the characters of an encoding, the progress of work.

A pipe or a file has no width, so nothing is wrapped there, and gets no colours.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from rich.cells import cell_len, set_cell_size

T = TypeVar("T")

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

status: Progress | None = None  # the line that is drawn now: other output makes room for it


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if "\u2800" <= character <= "\u28ff":  # the frames of rich's spinner
        return "*"
    return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()


codecs.register_error("plmtune", _replace)


def open_closed_streams() -> None:
    """Lead a standard stream that the caller closed (``>&-``) to nowhere; a file opened later would take its place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


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

    def spelled(found: re.Match[str]) -> str:
        character = ord(found.group())
        return f"\\x{character:02x}" if character < 256 else f"\\u{character:04x}"

    return _CONTROL.sub(spelled, text)


def shown(text: str, stream: TextIO) -> str:
    """Return `text` as it is printed to `stream`: escaped on a terminal, unchanged on a pipe."""
    return visible(text) if stream.isatty() else text


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


def echo(text: str = "", *, err: bool = False, dim: bool = False) -> None:
    """Print prose to stdout or stderr, wrapped on a terminal, with control characters escaped."""
    stream = sys.stderr if err else sys.stdout
    lines = wrap(encodable(visible(text), encoding(stream)), columns(stream))
    if dim and coloured(stream):
        lines = [style(line, "dim") for line in lines]
    line = status
    if line is not None:
        line.clear()
    print("\n".join(lines), file=stream, flush=True)
    if status:
        status.draw()


def say(text: str, *, dim: bool = False) -> None:
    """Print prose to stderr."""
    echo(text, err=True, dim=dim)


class Warnings(logging.Handler):
    """Prints what is logged as `echo` prints prose."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            echo(self.format(record), err=True)
        except Exception:  # as in logging's own handlers
            self.handleError(record)


class Progress(contextlib.AbstractContextManager["Progress"]):
    """One line of stderr that is drawn over. Where a stream cannot do that, a line is printed now and then.

    Used in a ``with`` block, the line is cleared at the end, and left as it is after an error. On a pipe the last
    state is printed if an earlier one was.

    Args:
        every: seconds between the lines of a pipe or a dumb terminal.
        shown: False shows nothing, on processes but the first.
    """

    def __init__(self, every: float = 10.0, *, shown: bool = True) -> None:
        self._in_place = in_place(sys.stderr)
        self._every = 0.1 if self._in_place else every
        self._shown = shown
        self._parts: tuple[str, ...] = ()
        self._printed: tuple[str, ...] | None = None
        self._at = float("-inf") if self._in_place else time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(keep=kind is not None and kind is not GeneratorExit)

    def update(self, *parts: str, now: bool = False) -> None:
        """Show as many parts from the left as there is room for, the first always; just after others only if `now`."""
        self._parts = parts
        moment = time.monotonic()
        if self._shown and (now or moment - self._at >= self._every):
            self._at = moment
            self._show()

    def close(self, *, keep: bool = False) -> None:
        """Clear the line, or leave it as it is now."""
        global status
        if not self._in_place:
            if self._printed not in (None, self._parts):
                self._show()
        elif status is self:
            with contextlib.suppress(OSError):
                if keep:
                    self.draw()
                    print(file=sys.stderr, flush=True)
                else:
                    self.clear()
            status = None

    def _show(self) -> None:
        global status
        with contextlib.suppress(OSError):  # the terminal is gone, or the disk is full that keeps the output
            if self._in_place:
                status = self
                self.draw()
            else:
                print(self._text(columns(sys.stderr)), file=sys.stderr, flush=True)
                self._printed = self._parts

    def draw(self) -> None:
        """Draw the line over what stands in its place."""
        room = (columns(sys.stderr) or 80) - 1  # a full line would move the cursor to the next
        print(f"\r\033[2K{self._text(room)}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for other output."""
        print("\r\033[2K", end="", file=sys.stderr, flush=True)

    def _text(self, room: int | None) -> str:
        """As many parts as there is room for."""
        text = ""
        for number in range(len(self._parts), 0, -1):
            text = encodable(visible(" · ".join(self._parts[:number])), encoding(sys.stderr))
            if room is None or cell_len(text) <= room:
                return text
        return set_cell_size(text, room or 0)


def track(items: Iterable[T], what: str, *, shown: bool = True) -> Iterator[T]:
    """Yield items and show how many have passed: "1,000 conversations read" for `what` "conversations read"."""
    with Progress(shown=shown) as progress:
        for number, item in enumerate(items, start=1):
            yield item
            progress.update(f"{number:,} {what}")
