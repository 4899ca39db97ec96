"""What a model answered, kept by the content of the question, so that nothing is computed twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import xxhash

from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.untrusted import load_json

T = TypeVar("T")

# The least number of parameters that any build of SQLite takes in one statement is 999.
_MOST_KEYS = 900
_WAIT_SECONDS = 60.0
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_CREATE = "CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, value BLOB, seal BLOB) WITHOUT ROWID"


def key(*parts: Any) -> bytes:
    """Hash parts that JSON can hold: the same content gives the same key, in any process."""
    return xxhash.xxh3_128_digest(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())


class ResultCache:
    """Values by key in one file, which any number of processes of one machine may use at once.

    SQLite with a write-ahead log: what `put` returned from is there after a kill at any moment, and no `put` waits for
    the disk, which a rollback journal does two times for each. A loss of power may cost the newest values, never the
    file. A value whose own checksum is wrong counts as missing.

    Args:
        path: the file; made with its folders where it is missing. One that is damaged is moved aside, which is said on
            stderr, and a new one begun.

    Raises:
        UserError: if nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent} cannot be made to keep results in: {error.strerror}.") from error
        with self._told():
            try:
                self._connection = self._open()
            except sqlite3.DatabaseError as error:
                if not _is_damaged(error):
                    raise
                self._begin_anew()

    def __enter__(self) -> ResultCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return the values of those keys that are known."""
        return self._whole_or_anew(lambda: self._read(keys))

    def put(self, values: Mapping[bytes, Any]) -> None:
        """Keep values that JSON can hold, all or none; numbers come back exactly as they were."""
        texts = [(held, json.dumps(value).encode()) for held, value in values.items()]
        rows = [(held, text, _seal(held, text)) for held, text in texts]

        def write() -> None:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", rows)

        self._whole_or_anew(write)

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_WAIT_SECONDS)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise _damage(found)
            with connection:
                connection.execute(_CREATE)
            columns = [row[1] for row in connection.execute("PRAGMA table_info(results)")]
            if columns != ["key", "value", "seal"]:
                raise _damage(f"its table has the columns {', '.join(columns)}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        found = {}
        rest = iter(dict.fromkeys(keys))
        while chunk := list(islice(rest, _MOST_KEYS)):
            marks = ",".join("?" * len(chunk))
            rows = self._connection.execute(f"SELECT key, value, seal FROM results WHERE key IN ({marks})", chunk)
            found.update({held: load_json(text) for held, text, seal in rows if _is_whole(held, text, seal)})
        return found

    def _whole_or_anew(self, act: Callable[[], T]) -> T:
        """Do something with the file; where it turns out damaged, begin a new one and go on."""
        with self._told():
            try:
                return act()
            except sqlite3.DatabaseError as error:
                if not _is_damaged(error):
                    raise
                self._connection.close()
                self._begin_anew()
                return act()

    def _begin_anew(self) -> None:
        aside = self.path.with_name(self.path.name + ".damaged")
        # The log first: beside a new file it would be taken for that one's.
        for end in ("-wal", "-shm", ""):
            held = Path(f"{self.path}{end}")
            if held.exists():
                held.replace(f"{aside}{end}")
        terminal.echo(
            f"plmtune: {self.path}, the results so far, is damaged: it was moved to {aside.name}, and what it held "
            "is computed again.",
            err=True,
        )
        self._connection = self._open()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{self.path} cannot keep results ({error}). Is its folder writable, with room on the disk? "
                "What was kept there before is still there."
            ) from error


def _seal(held: bytes, text: bytes) -> bytes:
    return xxhash.xxh3_64_digest(held + text)


def _is_whole(held: bytes, text: object, seal: object) -> bool:
    return isinstance(text, bytes) and seal == _seal(held, text)


def _damage(reason: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(reason)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _is_damaged(error: sqlite3.DatabaseError) -> bool:
    # The low byte is the kind; the others say where it was noticed.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
