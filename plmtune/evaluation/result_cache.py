"""A cache of a model's answers by the content of the request."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent} cannot be made to keep results in: {error.strerror}.") from error
        self._connection: sqlite3.Connection | None = None
        self._access(lambda connection: None)

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return the values of those keys that are known."""

        def read(connection: sqlite3.Connection) -> dict[bytes, Any]:
            found = {}
            rest = iter(dict.fromkeys(keys))
            while chunk := list(islice(rest, _MOST_KEYS)):
                marks = ",".join("?" * len(chunk))
                rows = connection.execute(f"SELECT key, value, seal FROM results WHERE key IN ({marks})", chunk)
                for held, text, seal in rows:
                    if isinstance(text, bytes) and seal == _seal(held, text):
                        found[held] = load_json(text)
            return found

        return self._access(read)

    def put(self, values: Mapping[bytes, Any]) -> None:
        """Keep JSON values, all or none; numbers are read back exactly."""
        texts = [(held, json.dumps(value).encode()) for held, value in values.items()]
        rows = [(held, text, _seal(held, text)) for held, text in texts]

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", rows)

        self._access(write)

    def _access(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """Access the file, which is opened once; if it is damaged, move it aside and begin a new one."""
        try:
            try:
                self._connection = self._connection or self._open()
                return act(self._connection)
            except sqlite3.DatabaseError as error:
                # The low byte is the kind; the others say where it was noticed.
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                    raise
                self.__exit__()
                self._move_aside()
                self._connection = self._open()
                return act(self._connection)
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{self.path} cannot keep results ({error}). Is its folder writable, with room on the disk? "
                "What was kept there before is still there."
            ) from error

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

    def _move_aside(self) -> None:
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


def _seal(held: bytes, text: bytes) -> bytes:
    return xxhash.xxh3_64_digest(held + text)


def _damage(reason: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(reason)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error
