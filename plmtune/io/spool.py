"""A document whose use is decided when all of it is read: kept in memory, or on disk if it is long."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import xxhash

# Characters that are kept in memory.
MAX_HELD = 1 << 22
_CHUNK = 1 << 20


class Document:
    """Pieces of a document's text, which can be iterated several times; a long one is in an unnamed file in `place`."""

    def __init__(self, place: Path) -> None:
        self.length = 0
        self._place = place
        self._held: list[str] = []
        self._file: IO[str] | None = None
        self._digest = xxhash.xxh3_64(seed=1)

    def add(self, piece: str) -> None:
        self.length += len(piece)
        self._digest.update(piece.encode("utf-8"))
        self._held.append(piece)
        if self.length > MAX_HELD:
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 (open as long as the document)
                    "w+", encoding="utf-8", newline="", dir=self._place
                )
            self._file.writelines(self._held)
            self._held.clear()

    def share(self) -> float:
        """A number in [0, 1) from a hash of the text."""
        return self._digest.intdigest() / 2**64

    def __iter__(self) -> Iterator[str]:
        if self._file is None:
            yield from self._held
            return
        self._file.seek(0)
        while piece := self._file.read(_CHUNK):
            yield piece
