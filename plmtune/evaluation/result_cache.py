"""A cache of a model's answers by the content of the request."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
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
    """Hash JSON values: equal content gives equal keys in any process."""
    return xxhash.xxh3_128_digest(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())


class ResultCache(AbstractContextManager["ResultCache"]):
    """Values by key in one file, which several processes of one machine may use at once.

    SQLite with a write-ahead log: values survive a kill after `put` returns, and no `put` waits for the disk, unlike
    with a rollback journal. A power failure may lose the newest values, never the file. A value with a wrong checksum
    counts as missing.

    Args:
        path: the file, created if missing. A damaged file is renamed, with a message on stderr.

    Raises:
        UserError: if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent} cannot be made to keep results in: {error.strerror}.") from error
        with self._as_user_error():
            try:
                self._connection = self._open()
            except sqlite3.DatabaseError as error:
                if not _is_damaged(error):
                    raise
                self._recreate()

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return the values of those keys that are known."""
        return self._or_recreate(lambda: self._read(keys))

    def put(self, values: Mapping[bytes, Any]) -> None:
        """Keep JSON values, all or none; numbers are read back exactly."""
        texts = [(held, json.dumps(value).encode()) for held, value in values.items()]
        rows = [(held, text, _seal(held, text)) for held, text in texts]

        def write() -> None:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", rows)

        self._or_recreate(write)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
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
            valid = ((held, text) for held, text, seal in rows if isinstance(text, bytes) and seal == _seal(held, text))
            found.update({held: load_json(text) for held, text in valid})
        return found

    def _or_recreate(self, act: Callable[[], T]) -> T:
        """Access the file; if it is damaged, create a new one and try again."""
        with self._as_user_error():
            try:
                return act()
            except sqlite3.DatabaseError as error:
                if not _is_damaged(error):
                    raise
                self._connection.close()
                self._recreate()
                return act()

    def _recreate(self) -> None:
        renamed = self.path.with_name(self.path.name + ".damaged")
        # The log first: beside a new file SQLite would apply it.
        for end in ("-wal", "-shm", ""):
            held = Path(f"{self.path}{end}")
            if held.exists():
                held.replace(f"{renamed}{end}")
        terminal.echo(
            f"plmtune: {self.path}, the results so far, is damaged: it was moved to {renamed.name}, and its results "
            "are computed again.",
            err=True,
        )
        self._connection = self._open()

    @contextmanager
    def _as_user_error(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{self.path} cannot keep results ({error}). Is its folder writable, with room on the disk? "
                "What was kept there before is still there."
            ) from error


def _seal(held: bytes, text: bytes) -> bytes:
    return xxhash.xxh3_64_digest(held + text)


def _damage(reason: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(reason)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _is_damaged(error: sqlite3.DatabaseError) -> bool:
    # The low byte is the kind; the others say where it was noticed.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
