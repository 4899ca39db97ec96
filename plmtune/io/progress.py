"""How far work is, on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.cells import cell_len, set_cell_size

from plmtune.io import terminal

T = TypeVar("T")
_SEPARATOR = " · "


class Progress(contextlib.AbstractContextManager["Progress"]):
    """One line of stderr that is drawn over. Where a stream cannot do that, a line is printed now and then.

    Used in a ``with`` block, the line is cleared at the end, and left as it is after an error. On a pipe the last
    state is printed if an earlier one was.

    Args:
        every: seconds between the lines of a pipe or a dumb terminal.
        shown: False shows nothing, on processes but the first.
    """

    def __init__(self, every: float = 10.0, *, shown: bool = True) -> None:
        self._in_place = terminal.in_place(sys.stderr)
        self._every = 0.1 if self._in_place else every
        self._shown = shown
        self._parts: tuple[str, ...] = ()
        self._printed: tuple[str, ...] | None = None
        self._at = float("-inf") if self._in_place else time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(keep=kind is not None and kind is not GeneratorExit)

    def update(self, *parts: str, now: bool = False) -> None:
        """Show the parts, as many of them from the left as there is room for; the first one always.

        Args:
            now: show them even if something was shown just before.
        """
        self._parts = parts
        moment = time.monotonic()
        if self._shown and (now or moment - self._at >= self._every):
            self._at = moment
            self._show()

    def close(self, *, keep: bool = False) -> None:
        """Clear the line, or leave it as it is now."""
        if not self._in_place:
            if self._printed not in (None, self._parts):
                self._show()
        elif terminal.status is self:
            with contextlib.suppress(OSError):
                if keep:
                    self.draw()
                    print(file=sys.stderr, flush=True)
                else:
                    self.clear()
            terminal.status = None

    def _show(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone, or the disk is full that keeps the output
            if self._in_place:
                terminal.status = self
                self.draw()
            else:
                print(self._text(terminal.columns(sys.stderr)), file=sys.stderr, flush=True)
                self._printed = self._parts

    def draw(self) -> None:
        """Draw the line over what stands in its place."""
        room = (terminal.columns(sys.stderr) or 80) - 1  # a full line would move the cursor to the next
        print(f"\r\033[2K{self._text(room)}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for other output."""
        print("\r\033[2K", end="", file=sys.stderr, flush=True)

    def _text(self, room: int | None) -> str:
        """As many parts as there is room for."""
        encoding = terminal.encoding(sys.stderr)
        parts = [terminal.encodable(terminal.visible(part), encoding) for part in self._parts]
        separator = terminal.encodable(_SEPARATOR, encoding)
        while room is not None and len(parts) > 1 and cell_len(separator.join(parts)) > room:
            parts.pop()
        text = separator.join(parts)
        return text if room is None or cell_len(text) <= room else set_cell_size(text, room)


def track(items: Iterable[T], what: str, *, shown: bool = True) -> Iterator[T]:
    """Yield items and show how many have passed: "1,000 conversations read" for `what` "conversations read"."""
    with Progress(shown=shown) as progress:
        for number, item in enumerate(items, start=1):
            yield item
            progress.update(f"{number:,} {what}")
