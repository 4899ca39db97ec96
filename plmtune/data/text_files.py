"""Documents from text, JSONL, CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

from plmtune.data.row_files import (
    COMPRESSION,
    MAX_DOCUMENT,
    MAX_ROW,
    check_encoding,
    check_ratio,
    describe_files,
    find_files,
    hash_files,
    kind_of,
    nearest,
    open_parquet,
    read_json_lines,
    read_table,
    read_text,
)
from plmtune.data.sources import Piece, Source, text_of, unread
from plmtune.errors import UserError
from plmtune.ranges import NotEmpty, check
from plmtune.registry import register
from plmtune.tokenizers.message import BadRow, Unused
from plmtune.units import unescape


def _cut_at(separator: str, pieces: Iterator[str]) -> Iterator[Piece]:
    rest, tail = "", len(separator) - 1
    for piece in pieces:
        *whole, rest = (rest + piece).split(separator)
        yield from ((text, True) for text in whole)
        if len(rest) > tail:  # the end may be the beginning of a separator
            yield rest[: len(rest) - tail], False
            rest = rest[len(rest) - tail :]
    yield rest, True


def _with_ink(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Leave out documents of white space alone, and empty pieces."""
    held: list[str] = []
    size, ink = 0, False
    for text, ends in pieces:
        if text:
            held.append(text)
            size += len(text)
            ink = ink or not text.isspace()
        if ends:
            if ink:
                yield "".join(held), True
            held, size, ink = [], 0, False
        elif ink and len(held) > 1:  # the last one may be the document's end
            yield "".join(held[:-1]), False
            held, size = held[-1:], len(held[-1])
        elif size > MAX_DOCUMENT:
            raise UserError(f"a document begins with more than {MAX_DOCUMENT:,} characters of white space")


def _joined(path: Path, pieces: Iterator[Piece]) -> Iterator[str]:
    """Yield whole documents; those of a compressed file have a size limit, since they could fill memory."""
    packed = path.suffix.lower() in COMPRESSION
    held: list[str] = []
    size = 0
    for text, ends in pieces:
        held.append(text)
        size += len(text)
        if packed and size > MAX_DOCUMENT:
            raise UserError(
                f"{path} unpacks to a document of more than {MAX_DOCUMENT:,} characters. Unpack it, or cut it into "
                "documents with separator (--separator)"
            )
        if ends:
            yield "".join(held)
            held, size = [], 0


def _rows_with(column: str, metadata: Any) -> int:
    """Return how many rows of a Parquet file have a value in a column, as far as its statistics say."""
    rows = metadata.num_rows
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            found = metadata.row_group(group).column(index)
            if found.path_in_schema == column and found.statistics is not None and found.statistics.has_null_count:
                rows -= found.statistics.null_count
    return int(rows)


class Files(Source):
    name = "files"

    def __init__(
        self,
        paths: tuple[str, ...],
        *,
        format: Literal["auto", "text", "jsonl", "csv", "parquet"],
        text_key: str,
        separator: str | None,
        encoding: str,
    ) -> None:
        self.paths, singly = find_files(paths)
        self.format = format
        self.text_key = text_key
        self.separator = separator
        self.encoding = encoding
        for path in self.paths:
            if path in singly and path.is_file() and path.stat().st_size == 0:
                raise UserError(f"{path} is empty")

    def documents(self, skip_bad: bool = False) -> Iterator[str]:
        """Read the files one after the other."""
        for stream in self.streams(skip_bad):
            yield from stream

    def streams(self, skip_bad: bool = False) -> Iterator[Iterator[str]]:
        """Read every file as a stream of its own; documents of white space alone are left out."""
        yield from map(_joined, self.paths, self.pieces(skip_bad))

    def pieces(self, skip_bad: bool = False) -> Iterator[Iterator[Piece]]:
        """Read as `streams`, text files in pieces of at most a mebibyte."""
        self.skipped, self.unused = 0, Unused()
        for path in self.paths:
            yield _with_ink(self._read(path, skip_bad))

    def _read(self, path: Path, skip_bad: bool) -> Iterator[Piece]:
        kind = (kind_of(path) or "text") if self.format == "auto" else self.format
        if kind == "text":
            yield from self._read_text(path)
            return
        rows = self._read_parquet(path) if kind == "parquet" else self._read_rows(path, kind)
        for place, row in rows:
            if isinstance(row, str):
                yield row, True
            elif skip_bad:
                self.skipped += 1
            else:
                remedy = "Correct it, or leave such rows out with skip_bad (--skip-bad)"
                raise UserError(f"{path}, {place} {row}. {remedy}") from row

    def _read_text(self, path: Path) -> Iterator[Piece]:
        pieces = read_text(path, self.encoding)
        if self.separator is not None:
            yield from _cut_at(self.separator, pieces)
            return
        yield from ((piece, False) for piece in pieces)
        yield "", True

    def _read_rows(self, path: Path, kind: str) -> Iterator[tuple[str, str | BadRow]]:
        read = read_json_lines if kind == "jsonl" else read_table
        for number, row in read(path, self.encoding):
            place = f"line {number}"
            try:
                yield place, row if isinstance(row, BadRow) else text_of(row, self.text_key)
                self.unused.add(unread(row, self.text_key))
            except BadRow as error:
                yield place, error

    def _read_parquet(self, path: Path) -> Iterator[tuple[str, str | BadRow]]:
        from pyarrow import types

        with open_parquet(path, self.text_key) as file:
            names = file.schema_arrow.names
            if self.text_key not in names:
                raise UserError(
                    f"{path} has no column {self.text_key}, only {', '.join(names)}."
                    f"{nearest(self.text_key, names)} Choose one with text_key (--text-key)"
                )
            kind, metadata = file.schema_arrow.field(self.text_key).type, file.metadata
            empty = {field.name for field in file.schema_arrow if types.is_null(field.type)}
        for name in names:
            if name not in (self.text_key, *empty) and (rows := _rows_with(name, metadata)):
                self.unused.add([name], rows)
        # Read as dictionary: a text that is stored once for many rows is not repeated in memory.
        text = types.is_string(kind) or types.is_large_string(kind)
        with open_parquet(path, self.text_key, read_dictionary=[self.text_key] if text else None) as file:
            number = unpacked = 0
            for batch in file.iter_batches(batch_size=1024, columns=[self.text_key]):
                for value in map(methodcaller("as_py"), batch.column(0)):
                    number += 1
                    unpacked += len(value) if isinstance(value, str) else 0
                    check_ratio(path, unpacked)
                    try:
                        if isinstance(value, str) and len(value) > MAX_ROW:
                            raise BadRow(f"has more than the {MAX_ROW:,} characters that a row can have")
                        yield f"row {number}", text_of({self.text_key: value}, self.text_key)
                    except BadRow as error:
                        yield f"row {number}", error

    def fingerprint(self) -> str:
        return hash_files(self.paths, [self.format, self.text_key, self.separator, self.encoding])

    def describe(self) -> str:
        return describe_files(self.paths)


@register("data", "files")
def files(
    paths: tuple[str, ...] = (),
    format: Literal["auto", "text", "jsonl", "csv", "parquet"] = "auto",
    text_key: str = "text",
    separator: str | None = None,
    encoding: str = "utf-8",
) -> Source:
    """Read text, JSONL (.jsonl, .json, .ndjson; one object a line), CSV, TSV and Parquet, also as .gz and .zst.

    Args:
        paths: files, folders (read whole, in the order of names) or globs.
        format: auto goes by the suffix; a file of unknown suffix, named singly, is text. csv: tables, whose first line
            names the columns.
        text_key: key or column that holds the text of a row.
        separator: cuts a text file into documents; none: a file is one document. The two characters ``\\n`` are a line
            feed, ``\\t`` a tab, ``\\r`` a carriage return, ``\\\\`` a backslash.
        encoding: of text, JSONL and CSV.

    Raises:
        UserError: for no path, a path that is not there, an empty file.
        ValueError: for an unknown encoding, an empty separator or one with another escape.
    """
    if not paths:
        raise UserError(
            "data files: paths is empty. Give files, folders or globs: data.paths=my_text/. "
            "(plmtune run demo trains a small model on the standard library.)"
        )
    check_encoding(encoding)
    check(NotEmpty(), text_key=text_key)
    if separator == "":
        raise ValueError("separator is the empty text; leave it out (null) to keep a file one document")
    cut = None if separator is None else unescape(separator, "separator")
    return Files(tuple(paths), format=format, text_key=text_key, separator=cut, encoding=encoding)
