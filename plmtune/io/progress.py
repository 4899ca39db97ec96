"""A word now and then from work that takes long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from plmtune.io import terminal

T = TypeVar("T")


def ticking(items: Iterable[T], what: str, *, shown: bool, every: float = 5.0) -> Iterator[T]:
    """Pass items on; every few seconds say on standard error how many have passed.

    Args:
        what: "conversations read", say.
        shown: False on all processes but one.
    """
    said, told, number = time.monotonic(), 0, 0
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if shown and now - said >= every:
            said, told = now, number
            terminal.echo(f"{number:,} {what}", err=True)
    if 0 < told < number:  # the last line tells of all of them
        terminal.echo(f"{number:,} {what}", err=True)
