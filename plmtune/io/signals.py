"""Signals that ask a process to stop: a run polls for them where it can, any other command ends in order."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any, NoReturn

# The exit code of a run that a signal stopped after saving: it can be resumed (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def end_in_order() -> None:
    """Let SIGTERM and SIGHUP raise SystemExit, so that temporary files are removed; by default they end a process."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    with contextlib.suppress(ValueError):  # handlers can be set in the main thread only
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # a command under nohup survives its terminal
                signal.signal(number, end)


class StopSignals:
    """Catches SIGINT, SIGTERM, SIGUSR1 and SIGHUP inside a ``with`` block. A second signal ends the process at once.

    `heard` is whether a signal came; `doing` is the message after the name of the first one; empty: none.
    """

    def __init__(self, doing: str) -> None:
        self.heard = False
        self._doing = doing
        self._heard_at = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        with contextlib.suppress(ValueError):  # handlers can be set in the main thread only
            for number in _SIGNALS:
                # A run under nohup survives its terminal.
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.perf_counter()
        if self.heard:
            # torchrun forwards a Ctrl-C: a second signal within a second is still the first one.
            if "TORCHELASTIC_RUN_ID" in os.environ and now - self._heard_at < 1.0:
                return
            os._exit(128 + number)
        self.heard, self._heard_at = True, now
        if self._doing:
            said = f"\n{signal.Signals(number).name}: {self._doing}\n"
            # Not through rich: its lock may be held by the code that this handler interrupts.
            with contextlib.suppress(OSError):
                os.write(2, said.encode())
