"""Data of tasks from files, where there is no hub: a map says which file is which split (docs/evaluation_data.md)."""

from __future__ import annotations

import csv
import difflib
import functools
import io
import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash
import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.environment import TemplateExpression

from plmtune.data.files import read_text
from plmtune.data.rows import read_rows
from plmtune.data.sources import BadRow
from plmtune.data.template_sandbox import Sandbox
from plmtune.errors import UserError, did_you_mean, unreadable

if TYPE_CHECKING:
    from datasets import Dataset

MAP_NAME = "tasks.yaml"
_SHIPPED = Path(__file__).with_name("known_files.yaml")
_MOST_BYTES = 2 << 30  # unpacked; all rows of a split are held in memory
_CHUNK = 1 << 20
_NEAR = 0.8  # of names that are for the most part alike by themselves: mmlu_anatomy, mmlu_astronomy
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_KEYS = ("file", "columns", "names")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class _Split:
    """What the map says of one split."""

    files: tuple[str, ...]
    columns: dict[str, str] | None
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class _Place:
    """A file that is there, or a file in a zip."""

    path: Path
    member: str | None

    def __str__(self) -> str:
        return str(self.path if self.member is None else self.path / self.member)


@dataclass(frozen=True)
class _Entry:
    """A task as the map has it: each split with where it is, None where none of its files is there."""

    splits: dict[str, tuple[_Split, _Place | None]]
    filled: dict[str, str]  # what the placeholder stands for


class LocalData:
    """Files that stand in for the hub's data sets.

    Attributes:
        where: the map's file.
    """

    def __init__(self, tasks: dict[str, dict[str, _Split]], folder: Path, where: Path) -> None:
        self.where = where
        self._tasks = tasks
        self._folder = folder
        self._members: dict[Path, frozenset[str]] = {}
        # The one with most text of its own first: mmlu_{subject}_generative before mmlu_{subject}.
        patterns = [key for key in tasks if _PLACEHOLDER.search(key)]
        self._patterns = sorted(patterns, key=lambda key: (-len(_PLACEHOLDER.sub("", key)), key))

    @classmethod
    def open(cls, path: Path) -> LocalData:
        """Read a map: a YAML file, or a folder with tasks.yaml, or a folder with files of usual names.

        Raises:
            UserError: if there is none, or it is wrong.
        """
        if path.is_dir():
            own = path / MAP_NAME
            return cls(_read_map(own if own.is_file() else _SHIPPED), path, own if own.is_file() else _SHIPPED)
        if not path.exists():
            raise UserError(
                f"--data {path} is not there (seen from {Path.cwd()}). Give a folder with data files, or a YAML file "
                "that maps tasks to files"
            )
        if path.suffix.lower() not in (".yaml", ".yml"):
            raise UserError(
                f"--data {path} is a data file: name it in a map, a YAML file with TASK: {{test: {path.name}}}"
            )
        return cls(_read_map(path), path.parent, path)

    def splits(self, task: str) -> tuple[str, ...]:
        """Name the splits of a task that are at hand; none for a task that is not in the map."""
        entry = self._find(task)
        return () if entry is None else tuple(name for name, (_, place) in entry.splits.items() if place is not None)

    def nearest(self, task: str) -> str:
        """Say which entry of a person's map may be meant for a task that has none; empty where none is near."""
        entries = self._tasks if self.where != _SHIPPED else {}
        near = difflib.get_close_matches(task, entries, n=1, cutoff=_NEAR) if self._match(task) is None else []
        return f"{self.where} has no entry for {task}; it has {near[0]}. Did you mean that?" if near else ""

    def check(self, task: str) -> None:
        """Raise UserError if the map names a file for just this task, and it is not there."""
        entry = self._find(task)
        for name, (split, place) in (entry.splits if entry is not None and self._meant(task) else {}).items():
            if place is None:
                files = " and ".join(str(self._folder / file) for file in split.files)
                raise UserError(f"{self.where} names {files} for {task}/{name}: it is not there")

    def absent(self, task: str) -> list[str]:
        """Files that would serve a task if they were in the folder."""
        entry = self._match(task)
        return [split.files[0] for split, place in entry.splits.values() if place is None] if entry is not None else []

    def dataset(self, task: str, splits: Collection[str]) -> dict[str, Dataset] | None:
        """Read splits of a task.

        Args:
            task: its name in lm-eval, of a single task.
            splits: those wanted; those that the map lacks are left out.

        Returns:
            The rows of each split, None if the map does not have the task.

        Raises:
            UserError: for a file that is not there, or a row that cannot be used, with its place.
        """
        entry = self._find(task)
        if entry is None:
            return None
        self.check(task)
        return {
            name: self._read(f"{task}/{name}", split, place, entry.filled)
            for name, (split, place) in entry.splits.items()
            if name in splits and place is not None
        }

    def describe(self, task: str) -> str:
        """Say in a line where the data of a task come from."""
        entry = self._find(task)
        if entry is None:
            return ""
        return ", ".join(f"{name}: {place}" for name, (_, place) in entry.splits.items() if place is not None)

    def fingerprint(self, task: str) -> str:
        """Hash what the files of a task hold, and how the map reads them."""
        entry = self._find(task)
        if entry is None:
            return ""
        digest = xxhash.xxh3_128()
        for name, (split, place) in entry.splits.items():
            digest.update(json.dumps([name, split.columns, split.names, entry.filled]).encode())
            if place is not None:
                with _opened(place) as file:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
        return digest.hexdigest()

    def _find(self, task: str) -> _Entry | None:
        entry = self._match(task)
        if entry is None or self._meant(task):
            return entry
        return entry if any(place is not None for _, place in entry.splits.values()) else None

    def _meant(self, task: str) -> bool:
        """What a person wrote for one task has to be there; the shipped map, and patterns, serve what is."""
        return task in self._tasks and self.where != _SHIPPED

    def _match(self, task: str) -> _Entry | None:
        if task in self._tasks:
            return self._entry(task, {})
        first = None
        for key in self._patterns:
            pattern = _PLACEHOLDER.sub(r"(?P<\1>[^/\\\\]+)", re.escape(key).replace(r"\{", "{").replace(r"\}", "}"))
            if (match := re.fullmatch(pattern, task)) is not None:
                entry = self._entry(key, match.groupdict())
                if any(place is not None for _, place in entry.splits.values()):
                    return entry
                first = first or entry
        return first

    def _entry(self, key: str, filled: dict[str, str]) -> _Entry:
        return _Entry(
            {
                name: (split, next(filter(None, (self._locate(_fill(file, filled)) for file in split.files)), None))
                for name, split in self._tasks[key].items()
            },
            filled,
        )

    def _locate(self, file: str) -> _Place | None:
        path = self._folder / file
        if path.is_file():
            return _Place(path, None)
        before, zipped, member = file.partition(".zip/")
        archive = self._folder / (before + ".zip")
        if not zipped or not archive.is_file():
            return None
        if archive not in self._members:
            with _zip(archive) as opened:
                self._members[archive] = frozenset(opened.namelist())
        return _Place(archive, member) if member in self._members[archive] else None

    def _read(self, what: str, split: _Split, place: _Place, filled: dict[str, str]) -> Dataset:
        import datasets
        import pyarrow

        where = str(place)
        rows = _rows(place, split.names)
        made = _columns(rows, split.columns, filled, where) if split.columns else _plain(rows, where)
        found = list(made)
        if not found:
            raise UserError(f"{where} holds no rows ({what} of {self.where})")
        try:
            return datasets.Dataset.from_list(found)
        except (pyarrow.ArrowException, TypeError, OverflowError) as error:
            raise UserError(f"{where}: a column has values of different kinds in different rows: {error}") from error


def _fill(text: str, filled: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: filled.get(match[1], match[0]), text)


# ---- the map


def _read_map(path: Path) -> dict[str, dict[str, _Split]]:
    try:
        read = yaml.load("".join(read_text(path, "utf-8")), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise UserError(f"{path}, line {line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    if not isinstance(read, dict) or not read:
        raise UserError(f"{path}: a map is task: {{split: file}}, such as gsm8k: {{test: gsm8k_test.jsonl}}")
    return {str(task): _task(path, str(task), splits) for task, splits in read.items()}


def _task(path: Path, task: str, splits: Any) -> dict[str, _Split]:
    names = _PLACEHOLDER.findall(task)
    if len(names) > 1 or not all(name.isidentifier() for name in names):
        raise UserError(f"{path}, key {task}: a pattern has one placeholder with a name, such as mmlu_{{subject}}")
    if not isinstance(splits, dict) or not splits:
        raise UserError(f"{path}, key {task}: name its splits, such as test: {task}_test.jsonl, not {splits!r}")
    return {str(split): _split(path, f"{task}.{split}", value, names) for split, value in splits.items()}


def _split(path: Path, key: str, value: Any, placeholders: list[str]) -> _Split:
    if isinstance(value, str | list):
        value = {"file": value}
    if not isinstance(value, dict) or "file" not in value:
        raise UserError(f"{path}, key {key}: give a file, or a mapping with file, columns and names, not {value!r}")
    for unknown in value.keys() - set(_KEYS):
        raise UserError(f"{path}, key {key}.{unknown}: unknown.{did_you_mean(str(unknown), _KEYS)}")
    files = [value["file"]] if isinstance(value["file"], str) else value["file"]
    columns, names = value.get("columns"), value.get("names")
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise UserError(f"{path}, key {key}.file: a file or a list of files, not {files!r}")
    texts = [text for pair in columns.items() for text in pair] if isinstance(columns, dict) else []
    if columns is not None and not (texts and all(isinstance(text, str) for text in texts)):
        raise UserError(f"{path}, key {key}.columns: each column with an expression, such as text: question, in quotes")
    if names is not None and not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}, key {key}.names: a list of the names of a CSV file's columns, not {names!r}")
    for file in files:
        for name in _PLACEHOLDER.findall(file):
            if name not in placeholders:
                raise UserError(f"{path}, key {key}.file: {file} has a placeholder {{{name}}} that its task has not")
    for column, text in (columns or {}).items():
        try:
            _compiled(text)
        except TemplateError as error:
            raise UserError(f"{path}, key {key}.columns.{column}: {text!r} is no expression: {error}") from error
    return _Split(tuple(files), columns, tuple(names) if names is not None else None)


# ---- rows of a file, each with its place in it


def _rows(place: _Place, names: tuple[str, ...] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if place.member is None:
        if place.path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{place} has more than the {_MOST_BYTES:,} bytes that the data of a task can have")
        yield from _rows_of(place.path, str(place), names)
        return
    # The readers take files: so a file in a zip lies in a folder of its own for as long as it is read.
    with tempfile.TemporaryDirectory(prefix="plmtune-") as folder, _opened(place) as packed:
        unpacked = Path(folder) / Path(place.member).name
        with unpacked.open("wb") as file:
            while chunk := packed.read(_CHUNK):
                if file.write(chunk) and file.tell() > _MOST_BYTES:
                    raise UserError(f"{place} unpacks to more than {_MOST_BYTES:,} bytes")
        yield from _rows_of(unpacked, str(place), names)


def _rows_of(path: Path, shown: str, names: tuple[str, ...] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _csv_rows(path, shown, names)
        return
    if names is not None:
        raise UserError(f"{shown}: the map gives names of columns, which only a CSV or TSV file takes")
    try:
        for place, row in read_rows([path]):
            line = place.removeprefix(f"{path}, ")
            if isinstance(row, BadRow):
                raise UserError(f"{shown}, {line} {row}")
            yield line, row
    except UserError as error:
        raise UserError(str(error).replace(str(path), shown)) from error


def _csv_rows(path: Path, shown: str, names: tuple[str, ...] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = "".join(read_text(path, "utf-8"))
    except UserError as error:
        raise UserError(str(error).replace(str(path), shown)) from error
    # Line ends inside of quotes are read as Python reads text, whichever system wrote them.
    lines = csv.reader(io.StringIO(text, newline=None), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    header = list(names) if names is not None else None
    try:
        for row in lines:
            if header is None:
                header = row
            elif len(row) != len(header):
                raise UserError(
                    f"{shown}, line {lines.line_num} has {len(row)} fields where {len(header)} are named "
                    f"({', '.join(header)})"
                )
            else:
                yield f"line {lines.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{shown}, line {lines.line_num} is no CSV: {error}") from error


def _plain(rows: Iterator[tuple[str, dict[str, Any]]], where: str) -> Iterator[dict[str, Any]]:
    """Rows as they are, which have to have the same columns: a table has no room for others."""
    first: dict[str, Any] | None = None
    for place, row in rows:
        first = row if first is None else first
        if row.keys() != first.keys():
            lacking, more = first.keys() - row.keys(), row.keys() - first.keys()
            what = f"lacks {', '.join(sorted(lacking))}" if lacking else f"has {', '.join(sorted(more))} besides"
            raise UserError(
                f"{where}, {place} {what}: the first row has {', '.join(first)}. Where rows differ, name the columns "
                "that the task reads in the map, under columns"
            )
        yield row


def _columns(
    rows: Iterator[tuple[str, dict[str, Any]]], columns: dict[str, str], filled: dict[str, str], where: str
) -> Iterator[dict[str, Any]]:
    """Rows with the columns of the map, computed from the file's."""
    compiled = {column: _compiled(text) for column, text in columns.items()}
    for place, row in rows:
        known = filled | row
        made = {}
        for column, expression in compiled.items():
            text = columns[column]
            if text in known:
                made[column] = known[text]
                continue
            _sandbox().restart()
            try:
                made[column] = _value(expression(known))
            except Exception as error:  # a person's expression meets a row: whatever Python says of the two
                kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
                raise UserError(
                    f"{where}, {place}: the column {column} ({text}) cannot be made: {kind}{error}. "
                    f"The row has {', '.join(known)}"
                ) from error
        yield made


def _value(value: Any) -> Any:
    if isinstance(value, StrictUndefined):
        return str(value)  # raises, and says what is undefined
    return list(value) if isinstance(value, Iterator) else value  # filters such as map give iterators


@functools.cache
def _sandbox() -> Sandbox:
    sandbox = Sandbox()
    sandbox.undefined = StrictUndefined
    return sandbox


@functools.cache
def _compiled(text: str) -> TemplateExpression:
    return _sandbox().compile_expression(text, undefined_to_none=False)


# ---- zip


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is damaged or not a zip file: {error}") from error


@contextmanager
def _opened(place: _Place) -> Iterator[BinaryIO]:
    """A file's bytes, out of a zip where it lies in one."""
    if place.member is None:
        with place.path.open("rb") as file:
            yield file
        return
    try:
        with _zip(place.path) as archive, archive.open(place.member) as packed:
            yield packed  # type: ignore[misc]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        raise UserError(f"{place} is damaged, or packed in a way that cannot be read: {error}") from error
