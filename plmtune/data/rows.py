"""Rows of conversations and preference pairs, from files (JSON arrays and lines, CSV, Parquet) or the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from plmtune.data import row_files
from plmtune.data.hub import Hub
from plmtune.data.row_files import MAX_BRACKETS, MAX_ROW, kind_of, read_text
from plmtune.data.sources import Dataset, type_name
from plmtune.errors import UserError, unreadable
from plmtune.ranges import AT_LEAST_1, NotEmpty, check
from plmtune.tokenizers.message import BadRow, Unused
from plmtune.units import show_number_of

REMEDY = "Correct them, or leave such rows out: chat.skip_bad=true"
_MOST_SHOWN = 8


@dataclass
class Refused:
    """Rows that cannot be used, by reason: the end of a sentence that begins with a verb, as in `BadRow`."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, place: str, reason: str | BadRow) -> None:
        """Count a row at `place`, such as "train.jsonl, line 17"."""
        self.merge(Refused({str(reason): 1}, {str(reason): place}))

    def merge(self, other: Refused) -> None:
        """Add the counts of another."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.first.setdefault(reason, other.first[reason])

    def __len__(self) -> int:
        return sum(self.counts.values())

    def describe(self) -> str:
        """Return a line for each reason, the first place in front; the most frequent reasons, where there are many."""
        reasons = sorted(self.counts, key=lambda reason: -self.counts[reason])
        lines = []
        for reason in reasons[:_MOST_SHOWN]:
            others = self.counts[reason] - 1
            lines.append(f"{self.first[reason]} {reason}" + (f"; {others:,} more like it" if others else ""))
        if rest := sum(self.counts[reason] for reason in reasons[_MOST_SHOWN:]):
            lines.append(f"{rest:,} more for {len(reasons) - _MOST_SHOWN:,} other reasons")
        return "\n".join(lines)

    def raise_if_any(self, remedy: str, good: int | None = None) -> None:
        """Raise one UserError that lists all reasons, if anything was refused, and how `good` others can be used."""
        if self.counts:
            rows = show_number_of(len(self), "row")
            if good == 0:
                rows, remedy = ("the only row" if len(self) == 1 else f"all {rows}"), ""
            raise UserError("\n".join(filter(None, [f"{rows} cannot be used:", self.describe(), remedy])))


class Rows:
    """Rows of files or of a dataset of the hub; for the arguments see `plmtune.data.conversations.conversations`."""

    def __init__(
        self,
        paths: Sequence[str] = (),
        *,
        hub: str | None = None,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        encoding: str = "utf-8",
        max_rows: int | None = None,
    ) -> None:
        if paths and hub is not None:
            raise UserError(f"data: give paths ({', '.join(paths)}) or hub ({hub}), not both")
        if not paths and hub is None:
            raise UserError(
                "data: paths is empty. Give files, data.paths=train.jsonl, or a dataset of the hub, data.hub=NAME. "
                "(plmtune run demo_sft, demo_dpo and demo_aries bring small data of their own.)"
            )
        check(AT_LEAST_1, max_rows=max_rows)
        check(NotEmpty(), hub=hub, subset=subset, split=split, revision=revision)
        others = {"subset": subset, "split": split if split != "train" else None, "revision": revision}
        if given := [f"{name}={value}" for name, value in others.items() if value is not None and hub is None]:
            raise UserError(f"data: {given[0]} goes with hub, a dataset of the Hugging Face hub; paths are read whole")
        if hub is not None and encoding != "utf-8":
            raise UserError(f"data: encoding={encoding} goes with paths; a dataset of the hub has none")
        row_files.check_encoding(encoding)
        self.encoding = encoding
        self.max_rows = max_rows
        self.files = find_row_files(paths) if hub is None else []
        self._hub = None if hub is None else Hub(hub, subset, split, "", revision, max_rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        rows = self._hub.rows() if self._hub is not None else read_rows(self.files, self.encoding)
        return islice(rows, self.max_rows)

    def fingerprint(self) -> str:
        """Return a hash that changes when the rows do."""
        if self._hub is not None:
            return self._hub.fingerprint()
        return row_files.hash_files(self.files, [self.encoding, self.max_rows])

    def describe(self) -> str:
        return self._hub.describe() if self._hub is not None else row_files.describe_files(self.files)


@dataclass(eq=False)
class FromRows(Dataset):
    """Data that is made of rows."""

    rows: Rows
    refused: Refused = field(default_factory=Refused, init=False)  # rows that the latest reading could not use

    def describe(self) -> str:
        return f"{self.name} of {self.rows.describe()}"

    def _read(self, convert: Callable[[dict[str, Any], str], Any], skip_bad: bool) -> Iterator[Any]:
        """Yield what `convert` makes of each row and its place; without `skip_bad` raise at the end for bad rows."""
        self.refused, self.unused = Refused(), Unused()
        good = 0
        for place, row in self.rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                made = convert(row, place)
            except BadRow as error:
                self.refused.add(place, error)
                continue
            self.unused.add(made.unused)
            yield made
            good += 1
        if not skip_bad:
            self.refused.raise_if_any(REMEDY, good=good)


_MAX_DEPTH = 64  # functions that walk through a row recurse for each level
_BETWEEN = re.compile(r"[ \t\r\n]*")


def read_rows(paths: Sequence[str | Path], encoding: str = "utf-8") -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Read rows of JSON arrays (.json), JSON lines (.jsonl, .ndjson, .json), tables (.csv, .tsv) and Parquet.

    All but Parquet also as .gz and .zst. A row that is a bare list stands for ``{"messages": list}``. Yields the place
    of each row, such as "train.jsonl, line 17", and the row or why it is bad.
    """
    for path in find_row_files(paths):
        for place, row in _read_file(path, encoding):
            if isinstance(row, list):
                row = {"messages": row}
            elif not isinstance(row, dict | BadRow):
                row = BadRow(f"is {type_name(row)}, not an object")
            if isinstance(row, dict) and _is_deep(row):
                row = BadRow(f"is nested deeper than {_MAX_DEPTH} levels")
            yield f"{path}, {place}", row


def find_row_files(paths: Sequence[str | Path]) -> list[Path]:
    """Resolve files, folders and globs to the files with rows."""
    found, singly = row_files.find_files(tuple(str(path) for path in paths))
    for path in singly:
        if kind_of(path) == "text":
            suffix = "".join(path.suffixes[-2:] if path.suffix.lower() in (".gz", ".zst") else path.suffixes[-1:])
            raise UserError(
                f"{path} is a {suffix} file: rows are read from .json, .jsonl, .ndjson, .csv, .tsv and .parquet"
            )
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        if kind_of(path) is None:
            _refuse_archive(path)
    files = [path for path in found if path in singly or kind_of(path) in ("jsonl", "csv", "parquet")]
    if not files:
        raise UserError(
            f"{', '.join(map(str, paths))}: no .json, .jsonl, .ndjson, .csv, .tsv or .parquet file is there"
        )
    return files


_ARCHIVES = {
    b"PK\x03\x04": "a ZIP archive, as .zip and .xlsx files are. Unpack it, or save the table as CSV",
    b"\x1f\x8b": "packed by gzip. Let its name end in .jsonl.gz or .csv.gz",
    b"\x28\xb5\x2f\xfd": "packed by zstd. Let its name end in .jsonl.zst or .csv.zst",
    b"PAR1": "a Parquet file. Let its name end in .parquet",
}


def _refuse_archive(path: Path) -> None:
    """Raise UserError for a file of unknown suffix whose first bytes are those of an archive."""
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError as error:
        raise unreadable(path, error) from error
    for mark, what in _ARCHIVES.items():
        if begin.startswith(mark):
            raise UserError(f"{path} is {what}")


def _read_file(path: Path, encoding: str) -> Iterator[tuple[str, Any | BadRow]]:
    rows: Iterator[tuple[int, Any | BadRow]]
    if kind_of(path) == "parquet":
        unit, rows = "row", row_files.read_parquet(path)
    elif kind_of(path) == "csv":
        unit, rows = "line", row_files.read_table(path, encoding)
    elif ".json" in path.suffixes[-2:] and _beginning(path, encoding).startswith("["):
        unit, rows = "row", enumerate(_read_array(path, encoding), 1)
    else:
        unit, rows = "line", _json_lines(path, encoding)
    for number, row in rows:
        yield f"{unit} {number}", row


def _json_lines(path: Path, encoding: str) -> Iterator[tuple[int, Any | BadRow]]:
    """The lines of a file of JSON, with a hint in the bad ones where the file looks like CSV."""
    hint = None
    for number, row in row_files.read_json_lines(path, encoding):
        if isinstance(row, BadRow) and hint is None:
            hint = ""
            with suppress(UserError):  # not in that encoding, as its reader says
                first = _beginning(path, encoding).partition("\n")[0]
                if "," in first and "{" not in first and not first.startswith("["):
                    hint = " (the file looks like CSV)"
        yield number, BadRow(f"{row}{hint}") if isinstance(row, BadRow) else row


def _beginning(path: Path, encoding: str) -> str:
    return next((piece.strip() for piece in read_text(path, encoding) if piece.strip()), "")


def _read_array(path: Path, encoding: str) -> Iterator[Any]:
    """Read the elements of an array one by one, so that a file may be larger than memory."""
    decoder = json.JSONDecoder()
    pieces = read_text(path, encoding)
    held, at, number = "", 0, 0
    whole = False  # `held` has the rest of the file

    def more() -> None:
        nonlocal held, at, whole
        # Double the text: an element of many pieces then takes few tries.
        parts, wanted = [held[at:]], max(len(held) - at, 1)
        for piece in pieces:
            parts.append(piece)
            wanted -= len(piece)
            if wanted <= 0:
                break
        else:
            whole = True
        held, at = "".join(parts), 0

    def next_sign() -> str:
        """Return the next character that is no white space, without consuming it."""
        nonlocal at
        while True:
            at = _BETWEEN.match(held, at).end()  # type: ignore[union-attr]
            if at < len(held):
                return held[at]
            if whole:
                return ""
            more()

    def wrong(what: str) -> UserError:
        after = f"after row {number}" if number else "at its beginning"
        return UserError(f"{path} is no JSON array of rows {after}: {what}. One object a line belongs in a .jsonl file")

    next_sign()
    at += 1  # the opening bracket
    sign = "" if next_sign() == "]" else ","
    while sign == ",":
        next_sign()
        value, end = _decode(decoder, held, at, whole)
        while end < 0:
            if whole:
                raise wrong(str(value))
            if len(held) - at > MAX_ROW:
                raise wrong(f"row {number + 1} has more than the {MAX_ROW:,} characters that a row can have")
            more()
            if held.count("[") + held.count("{") > MAX_BRACKETS:
                raise wrong(f"row {number + 1} has more than {MAX_BRACKETS:,} brackets")
            value, end = _decode(decoder, held, at, whole)
        number, at = number + 1, end
        yield value
        if (sign := next_sign()) == ",":
            at += 1
    if next_sign() != "]":
        raise wrong(f"a comma or a closing bracket is missing, {sign!r} stands there")
    at += 1
    if sign := next_sign():
        raise wrong(f"{sign!r} stands behind the array")


def _decode(decoder: json.JSONDecoder, held: str, at: int, whole: bool) -> tuple[Any, int]:
    """Return (value, its end), or (what is wrong, -1) for text that is no JSON, perhaps because it is incomplete."""
    try:
        value, end = decoder.raw_decode(held, at)
    except json.JSONDecodeError as error:
        return f"{error.msg} {error.pos - at:,} characters into the row", -1
    except ValueError as error:  # a number of thousands of digits
        return str(error), -1
    except RecursionError:
        return "the row is nested too deeply to read", -1
    # A number at the very end may continue in the next piece.
    return (value, end) if end < len(held) or whole else ("it is cut off", -1)


def _is_deep(row: dict[str, Any]) -> bool:
    level: list[Any] = [row]
    for _ in range(_MAX_DEPTH):
        inside = [value for held in level for value in (held.values() if isinstance(held, dict) else held)]
        level = [value for value in inside if isinstance(value, dict | list)]
        if not level:
            return False
    return True
