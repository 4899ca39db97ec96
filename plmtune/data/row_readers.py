"""Rows of files: JSON arrays, JSON lines, CSV and Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from plmtune.data.row_files import (
    MAX_BRACKETS,
    MAX_ROW,
    check_ratio,
    find_files,
    kind_of,
    open_parquet,
    read_json_lines,
    read_table,
    read_text,
)
from plmtune.data.sources import type_name
from plmtune.errors import UserError, unreadable
from plmtune.tokenizers.message import BadRow

_PARQUET_BATCH = 16  # rows: a value that is stored once for many rows is repeated in memory
_MAX_DEPTH = 64  # functions that walk through a row recurse for each level
_BETWEEN = re.compile(r"[ \t\r\n]*")


def read_rows(paths: Sequence[str | Path], encoding: str = "utf-8") -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Read rows of JSON arrays (.json), JSON lines (.jsonl, .ndjson, .json), tables (.csv, .tsv) and Parquet.

    All but Parquet also as .gz and .zst. A row that is a bare list stands for ``{"messages": list}``.

    Args:
        paths: files, folders (read whole, in the order of names) or globs.
        encoding: of JSON and CSV.

    Yields:
        The place of the row, such as "train.jsonl, line 17", and the row or why it is bad.
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
    found, singly = find_files(tuple(str(path) for path in paths))
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
    if kind_of(path) == "parquet":
        yield from _read_parquet(path)
    elif kind_of(path) == "csv":
        for number, row in read_table(path, encoding):
            yield f"line {number}", row
    elif ".json" in path.suffixes[-2:] and _starts_with_bracket(path, encoding):
        for number, row in enumerate(_read_array(path, encoding), 1):
            yield f"row {number}", row
    else:
        hint: str | None = None
        for number, row in read_json_lines(path, encoding):
            if isinstance(row, BadRow):
                if hint is None:  # computed at the first bad line
                    hint = " (the file looks like CSV)" if _looks_like_csv(path, encoding) else ""
                row = BadRow(f"{row}{hint}")
            yield f"line {number}", row


def _looks_like_csv(path: Path, encoding: str) -> bool:
    try:
        first = next((piece for piece in read_text(path, encoding) if piece.strip()), "").strip().partition("\n")[0]
    except UserError:  # not in that encoding, as its reader says
        return False
    return "," in first and "{" not in first and not first.startswith("[")


def _starts_with_bracket(path: Path, encoding: str) -> bool:
    return next((piece.lstrip()[0] for piece in read_text(path, encoding) if piece.strip()), "") == "["


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
    if next_sign() == "]":
        at += 1
    else:
        while True:
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
            sign = next_sign()
            at += 1
            if sign == "]":
                break
            if sign != ",":
                raise wrong(f"a comma or a closing bracket is missing, {sign!r} stands there")
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


def _read_parquet(path: Path) -> Iterator[tuple[str, Any | BadRow]]:
    number = unpacked = 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            unpacked += batch.nbytes
            check_ratio(path, unpacked)
            for index in range(batch.num_rows):
                number += 1
                row = batch.slice(index, 1)
                if row.nbytes > MAX_ROW or sum(map(_num_values, row.columns)) > MAX_BRACKETS:
                    yield f"row {number}", BadRow(f"has more than the {MAX_ROW:,} bytes that a row can have")
                else:
                    yield f"row {number}", row.to_pylist()[0]


def _num_values(array: Any) -> int:
    """Count the values at all depths: a null takes a bit on disk, and an object in memory."""
    import pyarrow

    count = len(array)
    if pyarrow.types.is_struct(array.type):
        return count + sum(map(_num_values, array.flatten()))
    if pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type):
        return count + _num_values(array.flatten())
    return count
