"""Files of text and rows, compressed or not: finding them, decoding them, reading lines, JSON and tables."""

from __future__ import annotations

import codecs
import csv
import glob
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from plmtune.errors import UserError, did_you_mean, refuse_pipe, unreadable
from plmtune.io.untrusted import load_json
from plmtune.tokenizers.message import BadRow

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_KINDS = {
    "jsonl": {".jsonl", ".ndjson", ".json"},
    "csv": {".csv", ".tsv"},
    "parquet": {".parquet"},
    "text": {
        ".txt", ".text", ".md", ".rst", ".tex", ".html", ".org", ".log", ".toml", ".yaml",
        ".py", ".c", ".h", ".cpp", ".hpp", ".cc", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql",
    },
}  # fmt: skip
_CHUNK = 1 << 20
# Larger files are recognized by size, time and both ends: reading hundreds of gigabytes takes too long.
_HASHED_WHOLE = 256 << 20
# A row, or a document of a compressed file, takes several times its size in memory.
MAX_ROW = 16 << 20
MAX_DOCUMENT = 64 << 20
MAX_BRACKETS = 1 << 20  # each takes 25 times its text in memory
_PARQUET_BATCH = 16  # rows: a value that is stored once for many rows is repeated in memory
# Text compresses to a tenth; a small file that unpacks to far more is made to fill memory or disk.
_MAX_RATIO = 200


def read_bytes(path: Path) -> Iterator[bytes]:
    """Read a file in chunks of at most 1 MiB, decompressing .gz and .zst."""
    compression = COMPRESSION.get(path.suffix.lower())
    try:
        if compression is None:
            with path.open("rb") as plain:
                while chunk := plain.read(_CHUNK):
                    yield chunk
            return
        import pyarrow

        # pyarrow detects truncated streams, which the zstandard package's reader does not
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
    """Raise UserError for a file that unpacks to far more than text does."""
    if unpacked > MAX_DOCUMENT and unpacked > _MAX_RATIO * (packed := path.stat().st_size):
        raise UserError(
            f"{path} has {packed:,} bytes and unpacks to more than {unpacked:,}: text does not pack to less than one "
            f"part in {_MAX_RATIO}. Unpack it yourself if you trust it"
        )


def read_text(path: Path, encoding: str) -> Iterator[str]:
    """Decode a file piece by piece, without its byte order mark."""
    decoder = codecs.getincrementaldecoder(encoding)()
    fed = 0
    try:
        for number, chunk in enumerate(read_bytes(path)):
            fed += len(chunk)
            piece = decoder.decode(chunk)
            yield piece if number else piece.removeprefix("\ufeff")
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, encoding, fed - len(error.object), error) from error


def _wrong_encoding(path: Path, encoding: str, begin: int, error: UnicodeDecodeError) -> UserError:
    """Name the byte that is wrong; `begin`: where the decoded bytes begin in the file."""
    packed = " of the unpacked text" if path.suffix.lower() in COMPRESSION else ""
    byte = f"byte {begin + error.start}{packed} is 0x{error.object[error.start]:02x} ({error.reason})"
    remedy = "If it has another encoding, name it: encoding=latin-1, utf-16, gb18030, ... (--encoding)"
    return UserError(f"{path} is not {encoding}: {byte}. {remedy}")


def _read_lines(path: Path, encoding: str) -> Iterator[bytes | None]:
    """Read a file line by line, without line ends; None stands for a line that is too long.

    A line is in `encoding`, or in UTF-8 if `encoding` has other line ends, as UTF-16 has.
    """
    parts: list[bytes] = []  # of the current line, joined once, so that a very long line takes linear time
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
            yield None  # once; the rest of the line is skipped
            parts = []
        held += len(rest)
        if held <= MAX_ROW:
            parts.append(rest)
    if any(parts):
        yield b"".join(parts)


def _is_wide(encoding: str) -> bool:
    return "\n".encode(encoding) != b"\n"


def read_json_lines(path: Path, encoding: str) -> Iterator[tuple[int, Any | BadRow]]:
    """Read JSON, one value a line: (line number, the value or why it is bad); blank lines are skipped."""
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
            why = f"is not {encoding} at byte {error.start} of the line (see encoding, --encoding){wide}"
            yield number, BadRow(why)
        except json.JSONDecodeError as error:
            array = {b"[": " (an array? ", b"{": " (an object of several lines? "}.get(line.strip(), "")
            array += "One object a line is needed)" if array else ""
            yield number, BadRow(f"is not JSON: {error.msg} at column {error.colno}{array}")
        except ValueError as error:  # a number of thousands of digits
            yield number, BadRow(f"cannot be read as JSON ({error})")


def read_table(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, str] | BadRow]]:
    """Read CSV or TSV: (line number, the row by the names of the first line, or why it is bad).

    The delimiter is a tab in .tsv, else a comma, or a semicolon if the first line has no comma. An empty field is no
    column of its row.
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
    """Yield the lines of a text with their ends."""
    lines_in = "utf-8" if _is_wide(encoding) else encoding
    offset = 0
    for number, line in enumerate(_read_lines(path, encoding), 1):
        if line is None:
            raise UserError(f"{path}, line {number}: has more than the {MAX_ROW:,} bytes that a row can have")
        try:
            text = line.decode(lines_in)
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, encoding, offset, error) from error
        yield (text.removeprefix("\ufeff") if number == 1 else text) + "\n"
        offset += len(line) + 1


def _suffix(path: Path) -> str:
    """Return a file's suffix, without .gz or .zst."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSION else suffix


def kind_of(path: Path) -> str | None:
    """Return text, jsonl, csv (tables) or parquet by the file's suffix (before .gz or .zst); None: unknown."""
    suffix = _suffix(path)
    return next((kind for kind, suffixes in _KINDS.items() if suffix in suffixes), None)


def find_files(paths: tuple[str, ...]) -> tuple[list[Path], set[Path]]:
    """Resolve files, folders and globs to (files in a stable order, those that were named one by one)."""
    found: dict[Path, None] = {}
    singly: set[Path] = set()
    for text in paths:
        if not text.strip():
            raise UserError("a path is empty, which would be the current folder. Name it as . if it is meant")
        path = Path(text).expanduser()
        if path.is_dir():
            named = sorted(p for p in path.rglob("*") if kind_of(p) and p.is_file())
            inside = [p for p in named if not any(part[0] == "." for part in p.relative_to(path).parts)]
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
                near = nearest(path.name, siblings)
                raise UserError(f"There is no file {text} (seen from {Path.cwd()}).{near}")
        found.update(dict.fromkeys(inside))
    return list(found), singly


def nearest(name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known)
    return hint if hint.endswith("?") else ""  # a folder's whole list of names would hide the message


def check_encoding(encoding: str) -> None:
    """Raise ValueError for an encoding that Python does not know."""
    try:
        "".encode(encoding)  # not codecs.lookup: some codecs make bytes of bytes, such as zip
    except LookupError as error:
        raise ValueError(f"encoding {encoding!r} is unknown to Python; utf-8, latin-1, gb18030 are known") from error


@contextmanager
def open_parquet(path: Path, column: str | None = None) -> Iterator[Any]:
    """Open a Parquet file whose columns, or one of them, unpack to a plausible size; errors become UserError."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            metadata = file.metadata
            for group in range(metadata.num_row_groups):
                columns = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
                check_ratio(path, sum(c.total_uncompressed_size for c in columns if column in (None, c.path_in_schema)))
            yield file
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or not Parquet: {error}") from error


def read_parquet(path: Path, column: str | None = None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Read rows of Parquet, of all columns or of one: (row number, the row or why it is bad)."""
    number = unpacked = 0
    with open_parquet(path, column) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=column and [column]):
            unpacked += batch.nbytes
            check_ratio(path, unpacked)
            for index in range(batch.num_rows):
                number += 1
                row = batch.slice(index, 1)
                if row.nbytes > MAX_ROW or sum(map(_num_values, row.columns)) > MAX_BRACKETS:
                    yield number, BadRow(f"has more than the {MAX_ROW:,} bytes that a row can have")
                else:
                    yield number, row.to_pylist()[0]


def _num_values(array: Any) -> int:
    """Count the values at all depths: a null takes a bit on disk, and an object in memory."""
    import pyarrow

    count = len(array)
    if pyarrow.types.is_struct(array.type):
        return count + sum(map(_num_values, array.flatten()))
    if pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type):
        return count + _num_values(array.flatten())
    return count


def hash_files(paths: Sequence[Path], how: Sequence[Any]) -> str:
    """Hash contents and how they are read (JSON), but not folders, so that a moved corpus keeps its hash."""
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
