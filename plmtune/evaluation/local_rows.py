"""Rows of local files, each with its place: reading, joining, filtering, and computing a task's columns."""

from __future__ import annotations

import csv
import functools
import io
import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import StrictUndefined, TemplateError
from jinja2.environment import TemplateExpression

from plmtune.data.row_files import read_text
from plmtune.data.rows import read_rows
from plmtune.errors import UserError, unreadable
from plmtune.tokenizers.message import BadRow
from plmtune.tokenizers.template_limits import TemplateLimit
from plmtune.tokenizers.template_sandbox import Sandbox

Row = tuple[str, dict[str, Any]]  # its file and line, for a person, and its fields
Where = str | dict[str, Any]
CHUNK = 1 << 20
_MOST_BYTES = 2 << 30  # unpacked; all rows of a split are held in memory
_SHOWN = 8  # values of a column
_TABLES = (".csv", ".tsv")
_TEXTS = (".lst", ".txt", ".labels")  # a value a line


@dataclass(frozen=True)
class Place:
    """A file that is there, or a file in a zip."""

    path: Path
    member: str | None

    def __str__(self) -> str:
        return str(self.path if self.member is None else self.path / self.member)


def rows_of(place: Place, names: Sequence[str] | None) -> Iterator[Row]:
    """Read the rows of a file.

    Args:
        names: of the columns of a CSV or TSV file without a header, or of a file with a value a line.
    """
    if place.member is None:
        if place.path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{place} has more than the {_MOST_BYTES:,} bytes that the data of a task can have")
        yield from _read(place.path, str(place), names)
        return
    # The readers need files, so a file in a zip is extracted to a temporary folder.
    with tempfile.TemporaryDirectory(prefix="plmtune-") as folder, opened(place) as packed:
        unpacked = Path(folder) / Path(place.member).name
        with unpacked.open("wb") as file:
            while chunk := packed.read(CHUNK):
                if file.write(chunk) and file.tell() > _MOST_BYTES:
                    raise UserError(f"{place} unpacks to more than {_MOST_BYTES:,} bytes")
        yield from _read(unpacked, str(place), names)


def _read(path: Path, shown: str, names: Sequence[str] | None) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if names is not None and suffix not in (*_TABLES, *_TEXTS):
        raise UserError(
            f"{shown}: the map gives names of columns, which only a CSV or TSV file takes, or one with a value a line "
            f"({', '.join(_TEXTS)})"
        )
    try:
        if suffix in _TABLES:
            yield from _table("".join(read_text(path, "utf-8")), "\t" if suffix == ".tsv" else ",", shown, names)
        elif names is None:
            for place, row in read_rows([path]):
                if isinstance(row, BadRow):
                    raise UserError(f"{place} {row}")
                yield place.replace(str(path), shown, 1), row
        elif len(names) == 1:
            for number, value in enumerate("".join(read_text(path, "utf-8")).splitlines(), 1):
                if value.strip():
                    yield f"{shown}, line {number}", {names[0]: value}
        else:
            raise UserError(f"{shown} has a value a line: give the name of one column in the map, names: [label]")
    except UserError as error:
        raise UserError(str(error).replace(str(path), shown)) from error


def _table(text: str, delimiter: str, shown: str, names: Sequence[str] | None) -> Iterator[Row]:
    # Line ends inside quotes are normalized as Python does in text files.
    lines = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter)
    header = names
    begin = 1  # of a row, which may span several lines
    try:
        for row in lines:
            line, begin = begin, lines.line_num + 1
            if header is None:
                header = row or None  # an empty line is no row
            elif row and len(row) != len(header):
                raise UserError(
                    f"{shown}, line {line} has {len(row)} fields where {len(header)} are named ({', '.join(header)})"
                )
            elif row:
                yield f"{shown}, line {line}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{shown}, line {lines.line_num} is no CSV: {error}") from error


def joined(rows: Iterator[Row], other: Iterator[Row], where: Place, beside: Place) -> Iterator[Row]:
    """Join the columns of two files row by row."""
    for number, (one, two) in enumerate(zip_longest(rows, other), 1):
        if one is None or two is None:
            longer, shorter = (two, where) if one is None else (one, beside)
            raise UserError(
                f"{longer[0]} is row {number:,}, and {shorter} has {number - 1:,}: files are joined row by row, "
                "so both have to have as many"
            )
        for name in one[1].keys() & two[1].keys():
            if one[1][name] != two[1][name]:
                raise UserError(
                    f"{one[0]} and {two[0]} are one row, and have two values of {name}: "
                    f"{one[1][name]!r:.40} and {two[1][name]!r:.40}"
                )
        yield one[0], one[1] | two[1]


def filtered(rows: Iterator[Row], keep: Where, filled: Mapping[str, str], where: Place) -> Iterator[Row]:
    """Yield the rows with the values of `keep` in columns, or for which the expression `keep` is true.

    row_number is the number of a row, from 1.
    """
    number = kept = 0
    seen: dict[str, None] = {}
    for place, row in rows:
        number += 1
        known = {"row_number": number, **filled, **row}
        if isinstance(keep, str):
            kept_here = bool(_evaluated(keep, known, f"{place}: where ({keep}) cannot be computed"))
        else:
            for column in keep.keys() - known.keys():
                raise UserError(f"{place} has no {column}, which where names. It has {', '.join(row)}")
            kept_here = all(_is_one_of(known[column], wanted) for column, wanted in keep.items())
            if len(seen) <= _SHOWN:
                seen[", ".join(f"{column}: {known[column]!r:.40}" for column in keep)] = None
        if kept_here:
            kept += 1
            yield place, row
    if number and not kept:
        there = f" It has {'; '.join([*seen][:_SHOWN])}" if seen else ""
        raise UserError(f"{where}: where ({keep}) leaves none of its {number:,} rows.{there}")


def _is_one_of(have: Any, wanted: Any) -> bool:
    """Whether a field equals a value of the map, or one of a list; fields of CSV files are texts."""
    return any(
        (have == value and isinstance(have, bool) == isinstance(value, bool))
        or (isinstance(have, str) and not isinstance(value, str) and have.strip().lower() == json.dumps(value))
        for value in (wanted if isinstance(wanted, list) else [wanted])
    )


def plain(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows unchanged; all must have the columns of the first, since they become a table."""
    first: dict[str, Any] | None = None
    for place, row in rows:
        first = row if first is None else first
        if row.keys() != first.keys():
            lacking, more = first.keys() - row.keys(), row.keys() - first.keys()
            what = f"lacks {', '.join(sorted(lacking))}" if lacking else f"has {', '.join(sorted(more))} besides"
            raise UserError(
                f"{place} {what}: the first row has {', '.join(first)}. Where rows differ, name the columns "
                "that the task reads in the map, under columns"
            )
        yield place, row


def with_columns(rows: Iterator[Row], columns: Mapping[str, str], filled: Mapping[str, str]) -> Iterator[Row]:
    """Yield rows with the columns of the map, computed from those of the file."""
    for place, row in rows:
        known, made = {**filled, **row}, {}
        for column, text in columns.items():
            what = f"{place}: the column {column} ({text}) cannot be made"
            made[column] = known[text] if text in known else _evaluated(text, known, what)
        yield place, made


def _evaluated(text: str, known: dict[str, Any], otherwise: str) -> Any:
    _sandbox().restart(length=sum(len(value) for value in known.values() if isinstance(value, str)))
    try:
        value = compiled(text)(known)
        if isinstance(value, StrictUndefined):
            str(value)  # raises, and names the undefined value
        return list(value) if isinstance(value, Iterator) else value  # filters such as map return iterators
    except Exception as error:  # an expression may raise anything
        kind = "" if isinstance(error, TemplateError | TemplateLimit) else f"{type(error).__name__}: "
        raise UserError(f"{otherwise}: {kind}{error}. The row has {', '.join(known)}") from error


@functools.cache
def _sandbox() -> Sandbox:
    sandbox = Sandbox()
    sandbox.undefined = StrictUndefined
    return sandbox


@functools.cache
def compiled(text: str) -> TemplateExpression:
    """Compile an expression of the map; TemplateError if it is none."""
    _sandbox().restart()
    return _sandbox().compile_expression(text, undefined_to_none=False)


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is damaged or not a zip file: {error}") from error


@contextmanager
def opened(place: Place) -> Iterator[BinaryIO]:
    """Open a file, or a file in a zip, for reading bytes."""
    if place.member is None:
        with place.path.open("rb") as file:
            yield file
        return
    try:
        with open_zip(place.path) as archive, archive.open(place.member) as packed:
            yield packed  # type: ignore[misc]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        raise UserError(f"{place} is damaged, or packed in a way that cannot be read: {error}") from error
