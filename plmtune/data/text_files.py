"""Documents from text, JSONL, CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from plmtune.data import row_files
from plmtune.data.row_files import COMPRESSION, MAX_DOCUMENT, kind_of
from plmtune.data.sources import Piece, Source
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


@dataclass(eq=False)
class Files(Source):
    name = "files"

    paths: list[Path]
    format: str
    text_key: str
    separator: str | None
    encoding: str

    def documents(self, skip_bad: bool = False) -> Iterator[str]:
        """Read the files one after the other; documents of white space alone are left out."""
        yield from chain.from_iterable(self.streams(skip_bad))

    def streams(self, skip_bad: bool = False) -> Iterator[Iterator[str]]:
        """Read every file as a stream of its own."""
        yield from map(_joined, self.paths, self.pieces(skip_bad))

    def pieces(self, skip_bad: bool = False) -> Iterator[Iterator[Piece]]:
        """Read as `streams`, text files in pieces of at most a mebibyte."""
        self.skipped, self.unused = 0, Unused()
        for path in self.paths:
            yield _with_ink(self._read(path, skip_bad))

    def _read(self, path: Path, skip_bad: bool) -> Iterator[Piece]:
        kind = (kind_of(path) or "text") if self.format == "auto" else self.format
        if kind == "text":
            pieces = row_files.read_text(path, self.encoding)
            if self.separator is None:
                yield from chain(((piece, False) for piece in pieces), [("", True)])
            else:
                yield from _cut_at(self.separator, pieces)
            return
        unit = "row" if kind == "parquet" else "line"
        rows: Iterator[tuple[int, Any | BadRow]]
        if kind == "parquet":
            self._count_other_columns(path)
            rows = row_files.read_parquet(path, self.text_key)
        else:
            rows = (row_files.read_json_lines if kind == "jsonl" else row_files.read_table)(path, self.encoding)
        places = ((f"{path}, {unit} {number}", row) for number, row in rows)
        yield from ((text, True) for text in self._texts(places, self.text_key, skip_bad))

    def _count_other_columns(self, path: Path) -> None:
        """Count the rows of Parquet that have a value in a column that is not read, as far as its statistics say."""
        from pyarrow import types

        with row_files.open_parquet(path, self.text_key) as file:
            schema, metadata = file.schema_arrow, file.metadata
        if self.text_key not in schema.names:
            raise UserError(
                f"{path} has no column {self.text_key}, only {', '.join(schema.names)}."
                f"{row_files.nearest(self.text_key, schema.names)} Choose one with text_key (--text-key)"
            )
        others = [field for field in schema if field.name != self.text_key and not types.is_null(field.type)]
        counts = {field.name: metadata.num_rows for field in others}
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(metadata.num_columns)):
                if column.path_in_schema in counts and column.statistics and column.statistics.has_null_count:
                    counts[column.path_in_schema] -= column.statistics.null_count
        for name, count in counts.items():
            self.unused.add([name] if count else [], count)

    def fingerprint(self) -> str:
        return row_files.hash_files(self.paths, [self.format, self.text_key, self.separator, self.encoding])

    def describe(self) -> str:
        return row_files.describe_files(self.paths)


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
    """
    if not paths:
        raise UserError(
            "data files: paths is empty. Give files, folders or globs: data.paths=my_text/. "
            "(plmtune run demo trains a small model on the standard library.)"
        )
    row_files.check_encoding(encoding)
    check(NotEmpty(), text_key=text_key)
    if separator == "":
        raise ValueError("separator is the empty text; leave it out (null) to keep a file one document")
    cut = None if separator is None else unescape(separator, "separator")
    found, singly = row_files.find_files(paths)
    if empty := next((path for path in found if path in singly and path.stat().st_size == 0), None):
        raise UserError(f"{empty} is empty")
    return Files(found, format, text_key, cut, encoding)
