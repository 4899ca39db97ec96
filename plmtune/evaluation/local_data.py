"""Data of tasks from files instead of the hub: a map assigns files to splits (docs/evaluation_data.md)."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
import yaml
from jinja2 import TemplateError

from plmtune.data.row_files import read_text
from plmtune.errors import UserError, did_you_mean, refuse_pipe
from plmtune.evaluation import local_rows
from plmtune.evaluation.local_rows import CHUNK, Place, Where, compiled, open_zip, opened
from plmtune.io.untrusted import load_yaml
from plmtune.tokenizers.template_limits import TemplateLimit

if TYPE_CHECKING:
    from datasets import Dataset

MAP_NAME = "tasks.yaml"
_BUILTIN = Path(__file__).with_name("known_files.yaml")
_NEAR = 0.8  # high, since names are similar: mmlu_anatomy, mmlu_astronomy
_PLACEHOLDER = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class _Split:
    files: list[str]  # of which the first that exists is read
    columns: dict[str, str] | None
    names: tuple[str, ...] | None
    where: Where | None
    join: list[dict[str, Any]]  # file and names of those whose columns stand beside its own, row by row


@dataclass(frozen=True)
class _Entry:
    """A task in the map.

    Attributes:
        places: of each split whose files exist: its file, and those that are joined to it.
        filled: values of placeholders.
    """

    splits: dict[str, _Split]
    places: dict[str, list[Place]]
    filled: dict[str, str]


_NOTHING = _Entry({}, {}, {})


class LocalData:
    """Files that replace the hub's data sets.

    Attributes:
        where: the map's file.
    """

    def __init__(self, tasks: dict[str, dict[str, _Split]], folder: Path, where: Path) -> None:
        self.where = where
        self._tasks = tasks
        self._folder = folder
        self._members: dict[Path, frozenset[str]] = {}
        self._places: dict[tuple[str, str], list[str]] = {}
        # The pattern with most literal text first: mmlu_{subject}_generative before mmlu_{subject}.
        patterns = [key for key in tasks if _PLACEHOLDER.search(key)]
        self._patterns = sorted(patterns, key=lambda key: (-len(_PLACEHOLDER.sub("", key)), key))

    @classmethod
    def open(cls, path: Path) -> LocalData:
        """Read a map: a YAML file, a folder with tasks.yaml, or a folder with files of usual names."""
        if path.is_dir():
            own = path / MAP_NAME
            return cls(_read_map(own if own.is_file() else _BUILTIN), path, own if own.is_file() else _BUILTIN)
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
        """Return the splits of a task whose files exist; none for a task that is not in the map."""
        return tuple(self._find(task).places)

    def nearest(self, task: str) -> str:
        """Suggest an entry of a user's map for a task without one; empty if no name is similar."""
        entries = self._tasks if self.where != _BUILTIN else {}
        near = difflib.get_close_matches(task, entries, n=1, cutoff=_NEAR) if not self._match(task).splits else []
        return f"{self.where} has no entry for {task}; it has {near[0]}. Did you mean that?" if near else ""

    def check(self, task: str) -> None:
        """Raise UserError if the user's map names a file for this task that does not exist."""
        if not self._meant(task):
            return
        entry = self._entry(task, {})
        for name, split in entry.splits.items():
            if name not in entry.places:
                first = any(self._locate(file, {}) for file in split.files)
                beside = [one["file"] for one in split.join if not self._locate(one["file"], {})]
                files = " and ".join(str(self._folder / file) for file in (beside if first else split.files))
                raise UserError(f"{self.where} names {files} for {task}/{name}: it is not there")

    def absent(self, task: str) -> list[str]:
        """Return files that would give a task its data if they were in the folder."""
        entry = self._match(task)
        return [split.files[0] for name, split in entry.splits.items() if name not in entry.places]

    def dataset(self, task: str, splits: Collection[str]) -> dict[str, Dataset] | None:
        """Read those splits of a task that the map has; None if it does not have the task."""
        entry = self._find(task)
        if not entry.splits:
            return None
        self.check(task)
        return {name: self._read(task, name, entry) for name in entry.places if name in splits}

    def describe(self, task: str) -> str:
        """Describe the origin of a task's data in one line."""
        entry = self._find(task)
        return ", ".join(
            " and ".join([f"{name}: {places[0]}", *(one["file"] for one in entry.splits[name].join)])
            for name, places in entry.places.items()
        )

    def place(self, task: str, split: str, index: int) -> str:
        """Return the place of a row of a split that `dataset` has read; empty if unknown."""
        places = self._places.get((task, split), [])
        return places[index] if index < len(places) else ""

    def fingerprint(self, task: str) -> str:
        """Hash the files of a task, and how the map reads them."""
        entry = self._find(task)
        digest = xxhash.xxh3_128()
        for name, split in entry.splits.items():
            more = (split.join, split.where) if split.join or split.where else ()
            how = [name, split.columns, split.names, entry.filled, *more]
            digest.update(json.dumps(how, default=str).encode())
            for place in entry.places.get(name, ()):
                with opened(place) as file:
                    while chunk := file.read(CHUNK):
                        digest.update(chunk)
        return digest.hexdigest()

    def _find(self, task: str) -> _Entry:
        entry = self._match(task)
        return entry if entry.places or self._meant(task) else _NOTHING

    def _meant(self, task: str) -> bool:
        """Whether the files must exist: those that a user names for one task, unlike patterns and the builtin map."""
        return task in self._tasks and self.where != _BUILTIN

    def _match(self, task: str) -> _Entry:
        if task in self._tasks:
            return self._entry(task, {})
        first = _NOTHING
        for key in self._patterns:
            pattern = _PLACEHOLDER.sub(r"(?P<\1>[^/\\\\]+)", re.escape(key).replace(r"\{", "{").replace(r"\}", "}"))
            if (match := re.fullmatch(pattern, task)) is not None:
                entry = self._entry(key, match.groupdict())
                if entry.places:
                    return entry
                first = entry if first is _NOTHING else first
        return first

    def _entry(self, key: str, filled: dict[str, str]) -> _Entry:
        places = {}
        for name, split in self._tasks[key].items():
            first = next(filter(None, (self._locate(file, filled) for file in split.files)), None)
            found = [first, *(self._locate(one["file"], filled) for one in split.join)]
            if all(found):
                places[name] = [place for place in found if place is not None]
        return _Entry(self._tasks[key], places, filled)

    def _locate(self, file: str, filled: dict[str, str]) -> Place | None:
        file = _PLACEHOLDER.sub(lambda match: filled.get(match[1], match[0]), file)
        path = self._folder / file
        if path.is_file():
            return Place(path, None)
        before, zipped, member = file.partition(".zip/")
        archive = self._folder / (before + ".zip")
        if not zipped or not archive.is_file():
            return None
        if archive not in self._members:
            with open_zip(archive) as opened:
                self._members[archive] = frozenset(opened.namelist())
        return Place(archive, member) if member in self._members[archive] else None

    def _read(self, task: str, name: str, entry: _Entry) -> Dataset:
        import datasets
        import pyarrow

        split, (place, *others) = entry.splits[name], entry.places[name]
        rows = local_rows.rows_of(place, split.names)
        for other, one in zip(others, split.join, strict=True):
            rows = local_rows.joined(rows, local_rows.rows_of(other, one["names"]), place, other)
        if split.where is not None:
            rows = local_rows.filtered(rows, split.where, entry.filled, place)
        columns = split.columns
        made = list(local_rows.with_columns(rows, columns, entry.filled) if columns else local_rows.plain(rows))
        if not made:
            raise UserError(f"{place} holds no rows ({task}/{name} of {self.where})")
        self._places[task, name] = [line for line, _ in made]
        try:
            return datasets.Dataset.from_list([row for _, row in made])
        except (pyarrow.ArrowException, TypeError, OverflowError) as error:
            raise UserError(f"{place}: a column has values of different kinds in different rows: {error}") from error


NO_DATA = LocalData({}, Path(), Path())


# ---- the map


def _read_map(path: Path) -> dict[str, dict[str, _Split]]:
    refuse_pipe(path)
    try:
        read = load_yaml("".join(read_text(path, "utf-8")))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise UserError(f"{path}, line {line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    if not isinstance(read, dict) or not read:
        raise UserError(f"{path}: a map is task: {{split: file}}, such as gsm8k: {{test: gsm8k_test.jsonl}}")
    try:
        return {str(task): _task(str(task), splits) for task, splits in read.items()}
    except UserError as error:
        raise UserError(f"{path}, key {error}") from error


def _need(right: bool, key: str, what: str, value: Any) -> None:
    """Raise UserError, without the name of the map, for a value that cannot be."""
    if not right:
        raise UserError(f"{key}: {what}, not {value!r}")


def _task(task: str, splits: Any) -> dict[str, _Split]:
    names = _PLACEHOLDER.findall(task)
    if len(names) > 1 or not all(name.isidentifier() for name in names):
        raise UserError(f"{task}: a pattern has one placeholder with a name, such as mmlu_{{subject}}")
    _need(bool(isinstance(splits, dict) and splits), task, f"name its splits, such as test: {task}_test.jsonl", splits)
    return {str(split): _split(f"{task}.{split}", value, names) for split, value in splits.items()}


def _split(key: str, value: Any, placeholders: list[str]) -> _Split:
    held = _file(key, value, "give a file, or a mapping with file, columns and names", "columns", "where", "join")
    files = [held["file"]] if isinstance(held["file"], str) else held["file"]
    _need(_are_texts(files), f"{key}.file", "a file or a list of files", files)
    columns, where, join = held["columns"], held["where"], held["join"]
    texts = [text for pair in columns.items() for text in pair] if isinstance(columns, dict) else columns
    what = "each column with an expression, such as text: question, in quotes"
    _need(columns is None or _are_texts(texts), f"{key}.columns", what, columns)
    what = "a file whose rows stand beside these, such as labels.lst, or a mapping with file and names"
    joined = [] if join is None else join if isinstance(join, list) else [join]
    others = [_file(f"{key}.join", one, what) for one in joined]
    for one in others:
        _need(isinstance(one["file"], str), f"{key}.join", what, one)
    for file in [*files, *(one["file"] for one in others)]:
        for name in _PLACEHOLDER.findall(file):
            if name not in placeholders:
                raise UserError(f"{key}.file: {file} has a placeholder {{{name}}} that its task has not")
    if isinstance(where, dict):
        values = [one for wanted in where.values() for one in (wanted if isinstance(wanted, list) else [wanted])]
        usable = bool(values) and all(isinstance(one, str | int | float | bool) for one in values)
    else:
        usable = where is None or (isinstance(where, str) and bool(where.strip()))
    what = "columns with the values of rows to keep, such as {split: test}, or an expression, such as "
    _need(usable, f"{key}.where", what + "\"split == 'test'\"", where)
    expressions = {f"columns.{column}": text for column, text in (columns or {}).items()}
    for name, text in (expressions | ({"where": where} if isinstance(where, str) else {})).items():
        try:
            compiled(text)
        except (TemplateError, TemplateLimit) as error:
            raise UserError(f"{key}.{name}: {text!r} is no expression: {error}") from error
    return _Split(files, columns, held["names"], where, others)


def _file(key: str, value: Any, what: str, *more: str) -> dict[str, Any]:
    """Return a file of the map with the names of its columns."""
    held = {"file": value} if isinstance(value, str | list) else value
    _need(isinstance(held, dict) and "file" in held, key, what, value)
    for unknown in held.keys() - {"file", "names", *more}:
        raise UserError(f"{key}.{unknown}: unknown.{did_you_mean(str(unknown), ('file', 'names', *more))}")
    names = held.get("names")
    _need(names is None or _are_texts(names), f"{key}.names", "a list of names of columns", names)
    columns = None if names is None else tuple(names)
    return {"file": held["file"], "names": columns, **{key: held.get(key) for key in more}}


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)
