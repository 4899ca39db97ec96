"""Text on disk: plain text, JSONL, CSV and Parquet, compressed or not, in files, folders and globs."""

from __future__ import annotations

import codecs
import csv
import glob
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

import xxhash

from plmtune.data.sources import Piece, Source, text_of, unread
from plmtune.errors import UserError, did_you_mean, refuse_pipe, unreadable
from plmtune.io.untrusted import load_json
from plmtune.ranges import NotEmpty, check
from plmtune.registry import register
from plmtune.tokenizers.message import BadRow, Unused
from plmtune.units import unescape

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_TABLES = {".csv", ".tsv"}
_TEXT = {
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".org", ".log",
    ".py", ".c", ".h", ".cpp", ".hpp", ".cc", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql",
    ".toml", ".yaml",
}  # fmt: skip
_CHUNK = 1 << 20
# Larger files are known by size, time and both ends: reading hundreds of gigabytes to find that nothing
# changed would cost more than it saves.
_HASHED_WHOLE = 256 << 20
# A row, or a document of a packed file, is held in memory several times over.
MAX_ROW = 16 << 20
_MAX_DOCUMENT = 64 << 20
MAX_BRACKETS = 1 << 20  # each takes 25 times its text in memory
# Text packs to a tenth; a file of a few bytes that unpacks without an end is made to fill memory or disk.
_MAX_RATIO = 200


def read_bytes(path: Path) -> Iterator[bytes]:
    """Read a file in chunks of at most 1 MiB, decompressing .gz and .zst.

    Raises:
        UserError: if it cannot be read, or is damaged as an archive.
    """
    compression = _COMPRESSION.get(path.suffix.lower())
    try:
        if compression is None:
            with path.open("rb") as plain:
                while chunk := plain.read(_CHUNK):
                    yield chunk
            return
        import pyarrow

        # pyarrow finds truncated streams, which the zstandard package's reader passes over in silence
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            unpacked = 0
            while chunk := stream.read(_CHUNK):
                unpacked += len(chunk)
                check_ratio(path, unpacked)
                yield chunk
    except OSError as error:
        if compression is None or error.errno is not None:
            raise unreadable(path, error) from error
        raise UserError(f"{path} is damaged or not {compression}: {error}. Fetch or compress it again") from error


def check_ratio(path: Path, unpacked: int) -> None:
    """Refuse (UserError) a file that unpacks to more than text can have been packed from."""
    if unpacked > _MAX_DOCUMENT and unpacked > _MAX_RATIO * (packed := path.stat().st_size):
        raise UserError(
            f"{path} has {packed:,} bytes and unpacks to more than {unpacked:,}: text does not pack to less than one "
            f"part in {_MAX_RATIO}. Unpack it yourself if you trust it"
        )


def read_text(path: Path, encoding: str) -> Iterator[str]:
    """Decode a file piece by piece, without its byte order mark.

    Raises:
        UserError: at the first byte that is not in `encoding`, with its offset.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    fed = 0
    first = True
    try:
        for chunk in read_bytes(path):
            fed += len(chunk)
            piece = decoder.decode(chunk)
            yield piece.removeprefix("\ufeff") if first else piece
            first = False
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(_wrong_encoding(path, encoding, fed - len(error.object) + error.start, error)) from error


def _wrong_encoding(path: Path, encoding: str, offset: int, error: UnicodeDecodeError) -> str:
    packed = " of the unpacked text" if path.suffix.lower() in _COMPRESSION else ""
    return (
        f"{path} is not {encoding}: byte {offset}{packed} is 0x{error.object[error.start]:02x} "
        f"({error.reason}). "
        "If it has another encoding, name it: encoding=latin-1, utf-16, gb18030, ... (--encoding)"
    )


def _read_lines(path: Path, encoding: str) -> Iterator[bytes | None]:
    """Read a file line by line, without the line ends; None stands for a line that is too long to hold.

    A line is in `encoding`, or where that has line ends of its own, as UTF-16 has, in UTF-8.
    """
    parts: list[bytes] = []  # of the line being read, joined once, so that a very long line stays linear
    held = 0
    wide = _is_wide(encoding)
    for chunk in (piece.encode() for piece in read_text(path, encoding)) if wide else read_bytes(path):
        *ended, rest = chunk.split(b"\n")
        if ended:
            if held <= MAX_ROW:
                yield b"".join([*parts, ended[0]])
            yield from ended[1:]
            parts, held = [], 0
        if held <= MAX_ROW < held + len(rest):
            yield None  # said once; the rest of the line is passed over
            parts = []
        held += len(rest)
        if held <= MAX_ROW:
            parts.append(rest)
    if any(parts):
        yield b"".join(parts)


def _is_wide(encoding: str) -> bool:
    return "\n".encode(encoding) != b"\n"


def read_json_lines(path: Path, encoding: str) -> Iterator[tuple[int, Any | BadRow]]:
    """Read JSON, one value a line: (line number, the value, or why there is none); blank lines are passed over."""
    lines_in = "utf-8" if _is_wide(encoding) else encoding
    for number, line in enumerate(_read_lines(path, encoding), 1):
        if line is None:
            yield number, BadRow(f"has more than the {MAX_ROW:,} bytes that a row can have")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark, as Windows editors write
        if not line.strip():
            continue
        if len(line) > MAX_BRACKETS and line.count(b"[") + line.count(b"{") > MAX_BRACKETS:
            yield number, BadRow(f"has more than {MAX_BRACKETS:,} brackets")
            continue
        try:
            yield number, load_json(line.decode(lines_in))
        except UnicodeDecodeError as error:
            marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            wide = "; it begins as UTF-16 does" if number == 1 and line.startswith(marks) else ""
            yield (
                number,
                BadRow(f"is not {encoding} at byte {error.start} of the line (see encoding, --encoding){wide}"),
            )
        except json.JSONDecodeError as error:
            array = {b"[": " (an array? ", b"{": " (an object of several lines? "}.get(line.strip(), "")
            array += "One object a line is needed)" if array else ""
            yield number, BadRow(f"is not JSON: {error.msg} at column {error.colno}{array}")
        except ValueError as error:  # a number of thousands of digits
            yield number, BadRow(f"cannot be read as JSON ({error})")


def read_table(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, str] | BadRow]]:
    """Read CSV or TSV: (line number, the row by the names of the first line, or why there is none).

    What separates columns is a tab in .tsv, else a comma, or a semicolon where the first line has no comma. An empty
    field is no column of its row.

    Raises:
        UserError: for a first line without names, or with one twice.
    """
    lines = _table_lines(path, encoding)
    first = next(lines, "")
    delimiter = "\t" if _suffix(path) == ".tsv" else ";" if "," not in first and ";" in first else ","
    rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    csv.field_size_limit(MAX_ROW)
    try:
        names = next(rows, [])
    except csv.Error as error:
        raise UserError(f"{path}, line 1 is no row of a table: {error}") from error
    if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise UserError(f"{path}: its first line has to name the columns, each once; it is {first.strip()[:80]!r}")
    while True:
        number = rows.line_num + 1
        try:
            fields = next(rows, None)
        except csv.Error as error:
            yield number, BadRow(f"is no row of a table ({error}): is a quotation mark open, or not doubled?")
            continue
        if fields is None:
            return
        if len(fields) == len(names):
            yield number, {name: field for name, field in zip(names, fields, strict=True) if field}
        elif fields:
            yield number, BadRow(f"has {len(fields)} fields where {len(names)} columns are named")


def _table_lines(path: Path, encoding: str) -> Iterator[str]:
    """The lines of a text with their ends."""
    lines_in = "utf-8" if _is_wide(encoding) else encoding
    offset = 0
    for number, line in enumerate(_read_lines(path, encoding), 1):
        if line is None:
            raise UserError(f"{path}, line {number}: has more than the {MAX_ROW:,} bytes that a row can have")
        try:
            text = line.decode(lines_in)
        except UnicodeDecodeError as error:
            raise UserError(_wrong_encoding(path, encoding, offset + error.start, error)) from error
        yield (text.removeprefix("\ufeff") if number == 1 else text) + "\n"
        offset += len(line) + 1


def _suffix(path: Path) -> str:
    """A file's suffix, before .gz or .zst."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSION else suffix


def kind_of(path: Path) -> str | None:
    """Return text, jsonl, csv (tables) or parquet by the file's suffix (before .gz or .zst); None: unknown."""
    suffix = _suffix(path)
    if suffix in _JSON_LINES:
        return "jsonl"
    if suffix in _TABLES:
        return "csv"
    return "parquet" if suffix == ".parquet" else "text" if suffix in _TEXT else None


def find_files(paths: tuple[str, ...]) -> tuple[list[Path], set[Path]]:
    """Resolve files, folders and globs to (files in a stable order, those of them that were named singly).

    Raises:
        UserError: for a path that is not there, a glob or folder without a file.
    """
    found: dict[Path, None] = {}
    singly: set[Path] = set()
    for text in paths:
        if not text.strip():
            raise UserError("a path is empty, which would be the current folder. Name it as . if it is meant")
        path = Path(text).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if kind_of(p) and p.is_file() and not _hidden(p, path))
            if not inside:
                raise UserError(f"The folder {text} holds no text, JSONL, CSV or Parquet file")
        elif path.exists():
            refuse_pipe(path)
            inside = [path]
            singly.add(path)
        else:
            # Path.glob takes no absolute patterns
            matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
            inside = sorted(p for p in matches if p.is_file())
            if not inside and any(c in text for c in "*?["):
                raise UserError(f"The glob {text} matches no file (seen from {Path.cwd()})")
            if not inside:
                siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
                near = _nearest(path.name, siblings)
                raise UserError(f"There is no file {text} (seen from {Path.cwd()}).{near}")
        found.update(dict.fromkeys(inside))
    return list(found), singly


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _nearest(name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known)
    return hint if hint.endswith("?") else ""  # a folder's whole list of names would hide the message


def _cut_at(separator: str, pieces: Iterator[str]) -> Iterator[Piece]:
    """Cut a text at each separator."""
    rest, tail = "", len(separator) - 1
    for piece in pieces:
        *whole, rest = (rest + piece).split(separator)
        yield from ((text, True) for text in whole)
        if len(rest) > tail:  # what stands last may be the beginning of a separator
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
        elif size > _MAX_DOCUMENT:
            raise UserError(f"a document begins with more than {_MAX_DOCUMENT:,} characters of white space")


def _joined(path: Path, pieces: Iterator[Piece]) -> Iterator[str]:
    """The documents whole; one of a packed file has a limit, since it may be made to fill memory."""
    packed = path.suffix.lower() in _COMPRESSION
    held: list[str] = []
    size = 0
    for text, ends in pieces:
        held.append(text)
        size += len(text)
        if packed and size > _MAX_DOCUMENT:
            raise UserError(
                f"{path} unpacks to a document of more than {_MAX_DOCUMENT:,} characters. Unpack it, or cut it into "
                "documents with separator (--separator)"
            )
        if ends:
            yield "".join(held)
            held, size = [], 0


def hash_files(paths: Sequence[Path], how: Sequence[Any]) -> str:
    """Hash what files hold and how it is read (JSON); not where they lie, so that a moved corpus stays the same."""
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(how).encode())
    for path in paths:
        try:
            status = path.stat()
            digest.update(f"{path.name} {kind_of(path)} {status.st_size}\n".encode())
            with path.open("rb") as file:
                if status.st_size > _HASHED_WHOLE:
                    digest.update(f"{status.st_mtime_ns}".encode())
                    digest.update(file.read(_CHUNK))
                    file.seek(-_CHUNK, 2)
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def describe_files(paths: Sequence[Path]) -> str:
    """Return names and size in one line for a person."""
    size = sum(path.stat().st_size for path in paths) / 1e6
    shown = ", ".join(path.name for path in paths[:3])
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{shown}{more} ({size:.1f} MB)"


def _rows_with(column: str, metadata: Any) -> int:
    """The rows of a Parquet file of which a column holds something, as far as the file says it."""
    rows = metadata.num_rows
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            found = metadata.row_group(group).column(index)
            if found.path_in_schema == column and found.statistics is not None and found.statistics.has_null_count:
                rows -= found.statistics.null_count
    return int(rows)


class Files(Source):
    """See `files`."""

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
        """Read every file in turn."""
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
                remedy = "Mend it, or leave such rows out with skip_bad (--skip-bad)"
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
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if self.text_key not in names:
                    raise UserError(
                        f"{path} has no column {self.text_key}, only {', '.join(names)}."
                        f"{_nearest(self.text_key, names)} Choose one with text_key (--text-key)"
                    )
                kind, metadata = file.schema_arrow.field(self.text_key).type, file.metadata
                empty = {field.name for field in file.schema_arrow if pyarrow.types.is_null(field.type)}
            for name in names:
                if name not in (self.text_key, *empty) and (rows := _rows_with(name, metadata)):
                    self.unused.add([name], rows)
            for group in range(metadata.num_row_groups):
                columns = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
                check_ratio(path, sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.text_key))
            # Read as it is stored: a text that stands there once for all rows is not repeated in memory.
            text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            with parquet.ParquetFile(path, read_dictionary=[self.text_key] if text else None) as file:
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
        except PermissionError as error:
            raise unreadable(path, error) from error
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged or not Parquet: {error}") from error

    def fingerprint(self) -> str:
        """Hash what is read and how; not where it lies, so that a moved corpus stays prepared."""
        return hash_files(self.paths, [self.format, self.text_key, self.separator, self.encoding])

    def describe(self) -> str:
        """Return one line for a person."""
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
    try:
        "".encode(encoding)  # not codecs.lookup: some codecs make bytes of bytes, such as zip
    except LookupError as error:
        raise ValueError(f"encoding {encoding!r} is unknown to Python; utf-8, latin-1, gb18030 are known") from error
    check(NotEmpty(), text_key=text_key)
    if separator == "":
        raise ValueError("separator is the empty text; leave it out (null) to keep a file one document")
    cut = None if separator is None else unescape(separator, "separator")
    return Files(tuple(paths), format=format, text_key=text_key, separator=cut, encoding=encoding)
