"""Data of tasks from files instead of the hub: a map assigns files to splits (docs/evaluation_data.md)."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
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
_KEYS = ("file", "columns", "names", "where", "join")
_JOIN_KEYS = ("file", "names")


@dataclass(frozen=True)
class _Joined:
    """A file whose columns are joined to those of another, row by row."""

    file: str
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class _Split:
    files: tuple[str, ...]
    columns: dict[str, str] | None
    names: tuple[str, ...] | None
    where: Where | None
    join: tuple[_Joined, ...]


@dataclass(frozen=True)
class _Entry:
    """A task in the map: each split with its place, None if none of its files exists."""

    splits: dict[str, tuple[_Split, Place | None]]
    filled: dict[str, str]  # values of placeholders


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
        entry = self._find(task)
        return () if entry is None else tuple(name for name, (_, place) in entry.splits.items() if place is not None)

    def nearest(self, task: str) -> str:
        """Suggest an entry of a user's map for a task without one; empty if no name is similar."""
        entries = self._tasks if self.where != _BUILTIN else {}
        near = difflib.get_close_matches(task, entries, n=1, cutoff=_NEAR) if self._match(task) is None else []
        return f"{self.where} has no entry for {task}; it has {near[0]}. Did you mean that?" if near else ""

    def check(self, task: str) -> None:
        """Raise UserError if the user's map names a file for this task that does not exist."""
        entry = self._find(task) if self._meant(task) else None
        for name, (split, place) in entry.splits.items() if entry is not None else ():
            if place is None and entry is not None:
                first = any(self._locate(_fill(file, entry.filled)) for file in split.files)
                beside = [one.file for one in split.join if not self._locate(_fill(one.file, entry.filled))]
                files = " and ".join(str(self._folder / file) for file in (beside if first else split.files))
                raise UserError(f"{self.where} names {files} for {task}/{name}: it is not there")

    def absent(self, task: str) -> list[str]:
        """Return files that would give a task its data if they were in the folder."""
        entry = self._match(task)
        return [split.files[0] for split, place in entry.splits.values() if place is None] if entry is not None else []

    def dataset(self, task: str, splits: Collection[str]) -> dict[str, Dataset] | None:
        """Read splits of a task.

        Args:
            task: the name of a single task in lm-eval.
            splits: those that the map lacks are left out.

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
            name: self._read(task, name, split, place, entry.filled)
            for name, (split, place) in entry.splits.items()
            if name in splits and place is not None
        }

    def describe(self, task: str) -> str:
        """Describe the origin of a task's data in one line."""
        entry = self._find(task)
        if entry is None:
            return ""
        return ", ".join(
            " and ".join([f"{name}: {place}", *(one.file for one in split.join)])
            for name, (split, place) in entry.splits.items()
            if place is not None
        )

    def place(self, task: str, split: str, index: int) -> str:
        """Return the place of a row of a split that `dataset` has read; empty if unknown."""
        places = self._places.get((task, split), [])
        return places[index] if index < len(places) else ""

    def fingerprint(self, task: str) -> str:
        """Hash the files of a task, and how the map reads them."""
        entry = self._find(task)
        if entry is None:
            return ""
        digest = xxhash.xxh3_128()
        for name, (split, place) in entry.splits.items():
            more = [asdict(one) for one in split.join], split.where
            how = [name, split.columns, split.names, entry.filled, *(more if any(more) else ())]
            digest.update(json.dumps(how, default=str).encode())
            beside = [self._locate(_fill(one.file, entry.filled)) for one in split.join]
            for held in [place, *beside] if place is not None else []:
                assert held is not None
                with opened(held) as file:
                    while chunk := file.read(CHUNK):
                        digest.update(chunk)
        return digest.hexdigest()

    def _find(self, task: str) -> _Entry | None:
        entry = self._match(task)
        if entry is None or self._meant(task):
            return entry
        return entry if any(place is not None for _, place in entry.splits.values()) else None

    def _meant(self, task: str) -> bool:
        """Whether the files must exist: those that a user names for one task, unlike patterns and the builtin map."""
        return task in self._tasks and self.where != _BUILTIN

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
        def there(split: _Split) -> Place | None:
            if not all(self._locate(_fill(one.file, filled)) for one in split.join):
                return None
            return next(filter(None, (self._locate(_fill(file, filled)) for file in split.files)), None)

        return _Entry({name: (split, there(split)) for name, split in self._tasks[key].items()}, filled)

    def _locate(self, file: str) -> Place | None:
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

    def _read(self, task: str, name: str, split: _Split, place: Place, filled: dict[str, str]) -> Dataset:
        import datasets
        import pyarrow

        where = str(place)
        rows = local_rows.rows_of(place, split.names)
        for one in split.join:
            beside = self._locate(_fill(one.file, filled))
            assert beside is not None
            rows = local_rows.joined(rows, local_rows.rows_of(beside, one.names), where, str(beside))
        if split.where is not None:
            rows = local_rows.filtered(rows, split.where, filled, where)
        if split.columns:
            made = list(local_rows.with_columns(rows, split.columns, filled, where))
        else:
            made = list(local_rows.plain(rows, where))
        if not made:
            raise UserError(f"{where} holds no rows ({task}/{name} of {self.where})")
        self._places[task, name] = [f"{where}, {line}" for line, _ in made]
        try:
            return datasets.Dataset.from_list([row for _, row in made])
        except (pyarrow.ArrowException, TypeError, OverflowError) as error:
            raise UserError(f"{where}: a column has values of different kinds in different rows: {error}") from error


def _fill(text: str, filled: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: filled.get(match[1], match[0]), text)


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
    _check_keys(path, key, value, _KEYS)
    files = [value["file"]] if isinstance(value["file"], str) else value["file"]
    columns = value.get("columns")
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise UserError(f"{path}, key {key}.file: a file or a list of files, not {files!r}")
    texts = [text for pair in columns.items() for text in pair] if isinstance(columns, dict) else []
    if columns is not None and not (texts and all(isinstance(text, str) for text in texts)):
        raise UserError(f"{path}, key {key}.columns: each column with an expression, such as text: question, in quotes")
    names, join = _names(path, key, value), _joined(path, key, value.get("join"))
    for file in [*files, *(one.file for one in join)]:
        for name in _PLACEHOLDER.findall(file):
            if name not in placeholders:
                raise UserError(f"{path}, key {key}.file: {file} has a placeholder {{{name}}} that its task has not")
    where = value.get("where")
    expressions = {f"columns.{column}": text for column, text in (columns or {}).items()}
    if isinstance(where, dict):
        values = [one for held in where.values() for one in (held if isinstance(held, list) else [held])]
        usable = bool(values) and all(isinstance(one, str | int | float | bool) for one in values)
    else:
        usable = where is None or (isinstance(where, str) and bool(where.strip()))
    if not usable:
        raise UserError(
            f"{path}, key {key}.where: columns with the values of rows to keep, such as {{split: test}}, or an "
            f"expression, such as \"split == 'test'\", not {where!r}"
        )
    for name, text in (expressions | ({"where": where} if isinstance(where, str) else {})).items():
        try:
            compiled(text)
        except (TemplateError, TemplateLimit) as error:
            raise UserError(f"{path}, key {key}.{name}: {text!r} is no expression: {error}") from error
    return _Split(tuple(files), columns, names, where, join)


def _check_keys(path: Path, key: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    for unknown in given.keys() - set(known):
        raise UserError(f"{path}, key {key}.{unknown}: unknown.{did_you_mean(str(unknown), known)}")


def _names(path: Path, key: str, given: dict[str, Any]) -> tuple[str, ...] | None:
    names = given.get("names")
    if names is not None and not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}, key {key}.names: a list of names of columns, not {names!r}")
    return None if names is None else tuple(names)


def _joined(path: Path, key: str, value: Any) -> tuple[_Joined, ...]:
    made = []
    for one in [] if value is None else value if isinstance(value, list) else [value]:
        held = {"file": one} if isinstance(one, str) else one
        if not isinstance(held, dict) or not isinstance(held.get("file"), str):
            raise UserError(
                f"{path}, key {key}.join: a file whose rows stand beside these, such as labels.lst, or a mapping with "
                f"file and names, not {one!r}"
            )
        _check_keys(path, f"{key}.join", held, _JOIN_KEYS)
        made.append(_Joined(held["file"], _names(path, f"{key}.join", held)))
    return tuple(made)
