"""Work of many items in a run without steps: it shows its progress, and ends between two items after a signal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from plmtune.io.signals import EXIT_STOPPED, StopSignals
from plmtune.io.terminal import echo, track

T = TypeVar("T")


class Interruptible(StopSignals):
    """The signals of a run; `stop_if_asked` and `progress` raise SystemExit with EXIT_STOPPED after one."""

    def __init__(self, run: Path) -> None:
        super().__init__("stopping; a second one ends it at once.")
        self._run = run

    def stop_if_asked(self) -> None:
        if self.heard:
            echo(f"stopped; resume it with: plmtune resume {self._run}", err=True)
            raise SystemExit(EXIT_STOPPED)

    def progress(self, items: Sequence[T], what: str) -> Iterable[T]:
        """Yield the items; report their number every few seconds."""
        for item in track(items, f"of {len(items)} {what}", shown=True):
            self.stop_if_asked()
            yield item
