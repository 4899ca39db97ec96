"""Builds lm-eval's tasks with their own prompts, filters and metrics, and data from files or the hub.

Only this module uses lm-eval's private names (`lm_eval.tasks._factory`, `_index`); tests check that they exist.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import jinja2
from lm_eval.api.group import Group
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.task import TaskConfig
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind

from plmtune.errors import UserError, did_you_mean
from plmtune.evaluation.local_data import LocalData
from plmtune.evaluation.task_columns import TEMPLATES, columns_of
from plmtune.evaluation.task_index import Known, lm_eval_folder
from plmtune.io import hub

_KINDS = {"task": Kind.TASK, "class": Kind.PY_TASK, "group": Kind.GROUP, "tag": Kind.TAG}
_CONFIG_KEYS = frozenset(field.name for field in fields(TaskConfig))
_FOLDER = lm_eval_folder().resolve()


class Builder(TaskFactory):
    """lm-eval's factory, whose tasks take their documents from `data` if it has them."""

    def __init__(self, known: Mapping[str, Known], data: LocalData) -> None:
        super().__init__()
        self._data = data
        self._with_code = {name for name, entry in known.items() if entry.code != "no"}
        self._entries = {
            name: Entry(
                name,
                _KINDS[entry.kind],
                Path(entry.path) if entry.path is not None else None,
                tags=set(entry.members) if entry.kind == "tag" else set(),
            )
            for name, entry in known.items()
        }

    def build_named(self, name: str) -> Task | Group | list[Task]:
        return self.build(self._entries[name], registry=self._entries)

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            return super()._load_full_config(entry, overrides)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # its YAML, or a function's module, which is user code
            raise UserError(f"{entry.yaml_path}: {entry.name} cannot be read: {_in_words(error)}") from error

    def _build_group_members(
        self, member_list: list[Any], group_name: str, overrides: dict[str, Any] | None, registry: dict[str, Entry]
    ) -> list[Task | Group]:
        members = list(member_list)
        for index, item in enumerate(members):
            # A task that is defined in its group gets an entry, so that it is built like all others.
            if isinstance(item, dict) and "group" not in item and item.get("task") not in registry:
                name = f"{group_name}::{item.get('task')}"
                members[index] = {**item, "task": name}
                registry[name] = Entry(name, Kind.TASK, None, cfg=dict(members[index]))
            elif isinstance(item, str) and item not in registry:
                raise UserError(f"The group {group_name} holds {item}, and there is no such task")
        built: list[Task | Group] = super()._build_group_members(members, group_name, overrides, registry)
        return built

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        config = self._load_full_config(entry, overrides)
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        builtin = entry.yaml_path is None or entry.yaml_path.is_relative_to(_FOLDER)
        where = f"the task {config['task']}" + ("" if builtin else f" ({entry.yaml_path})")
        if config.get("unsafe_code") and entry.name not in self._with_code:
            raise UserError(f"{where} has unsafe_code inside a group: give it a YAML file of its own")
        base = config.get("class", ConfigurableTask)
        if base is ConfigurableTask:
            self._check(where, config, entry.name in self._with_code)
        if config.get("process_docs") is not None:
            config["process_docs"] = _once(config["process_docs"])
        documents = _Documents(entry.name, where, config, self._data)
        made = type(base.__name__, (_WithDocuments, base), {"documents": documents, "__module__": base.__module__})
        try:
            task = made(config=config) if "config" in inspect.signature(base.__init__).parameters else made()
            if "class" in config and hasattr(task.config, "task"):
                task.config.task = config["task"]
        except (UserError, MemoryError):
            raise
        except Exception as error:  # prompts are made of the first document, and the task's functions run
            raise UserError(documents.explain(error)) from error
        if isinstance(task, ConfigurableTask) and base.process_results is ConfigurableTask.process_results:
            _check_targets(where, task, documents)
        return task

    def entry(self, name: str) -> str:
        """Return the entry of a map for a task; its data are not read."""
        config = self._load_full_config(self._entries[name])
        return _Documents(name, f"the task {name}", config, self._data).entry()

    @staticmethod
    def _check(where: str, config: Mapping[str, Any], with_code: bool) -> None:
        for key in config.keys() - _CONFIG_KEYS:
            raise UserError(f"{where}: lm-eval knows no key {key}.{did_you_mean(str(key), _CONFIG_KEYS)}")
        metrics = config.get("metric_list") if config.get("process_results") is None else None
        for name in (metric.get("metric") for metric in metrics or () if isinstance(metric, dict)):
            if isinstance(name, str) and name not in metric_registry and not (with_code and name == "code_eval"):
                raise UserError(
                    f"{where}: {name} is none of lm-eval's metrics. Metrics of the hub are programs and are not run; "
                    f"write it as a function (!function FILE.NAME).{did_you_mean(name, metric_registry)}"
                )


class _Documents:
    """A task's documents: rows of files, if the map has some, and what is wrong with them.

    Attributes:
        evaluated: the split that the task is evaluated on.
        lacking: splits that the map does not have, which are empty.
    """

    def __init__(self, name: str, where: str, config: dict[str, Any], data: LocalData) -> None:
        self._name, self._where, self._config, self._data = name, where, config, data
        self.evaluated: str | None = config.get("test_split") or config.get("validation_split")
        self.lacking: set[str] = set()
        self.columns: list[str] = []  # of the files; empty where there are none
        own = config.get("class")
        keys = ("dataset_path", "dataset_name")
        self.source: list[str | None] = [config.get(key) or getattr(own, key.upper(), None) for key in keys]

    def local(self) -> dict[str, datasets.Dataset] | None:
        """Return the splits in the map, None if it does not have the task."""
        have, evaluated = self._data.splits(self._name), self.evaluated
        if not have:
            return None
        wanted = set(_splits(self._config)) if evaluated else set(have)  # a task's own class may read any split
        if evaluated and evaluated not in have:
            raise UserError(
                f"{self._data.where} has {', '.join(have)} of {self._where}, which is evaluated on its split "
                f"{evaluated}." + (self.meant(evaluated) or f" Add it to the map:\n{self.entry()}")
            )
        found = self._data.dataset(self._name, wanted & set(have)) or {}
        self.columns = list(next(iter(found.values())).features)
        for column in (self._config.get(key) for key in TEMPLATES if self._config.get("process_docs") is None):
            # lm-eval takes the name of a missing column as the text
            if isinstance(column, str) and column.isidentifier() and column not in self.columns:
                raise UserError(self._no_column(column))
        self.lacking = wanted - found.keys()
        # lm-eval reads examples when a task is built, even if prompts have none.
        return _Splits(self._where, found | {split: found[evaluated].select([]) for split in self.lacking if evaluated})

    def place(self, index: int) -> str:
        """Return the row of a file with a document, if known."""
        changed = self._config.get("process_docs") is not None
        place = "" if changed else self._data.place(self._name, self.evaluated or "", index)
        return f" ({place})" if place else ""

    def meant(self, split: str) -> str:
        """Suggest a split of the map with a similar name; empty if there is none."""
        near = difflib.get_close_matches(split, self._data.splits(self._name), n=1)
        return f" Is {near[0]} meant to be it?" if near else ""

    def entry(self) -> str:
        """Return an entry of a map for the task, to be filled in."""
        evaluated, examples = self.evaluated or "SPLIT", _example_split(self._config)
        names, complete = columns_of(self._config)
        shown = ", ".join(names) if names else f"as {self.source[0]} has them"
        more = "" if complete or not names else " and what its functions read"
        entry = f"{self._name}:\n  {evaluated}: {self._name}_{evaluated}.jsonl  # columns: {shown}{more}"
        if examples in (None, evaluated):
            return entry
        return f"{entry}\n  {examples}: {self._name}_{examples}.jsonl  # the same, for few-shot examples"

    def how_to_get(self, error: Exception) -> str:
        """Return a message with the missing data, and both ways to get them."""
        path, name = self.source
        if path is None:
            return f"{self._where[:1].upper() + self._where[1:]} names no data: add dataset_path, or a map (--data)"
        what = ", ".join(repr(part) for part in (path, name) if part is not None)
        reason = _in_words(error)
        if isinstance(error, OSError) and (why := hub.unavailable_reason()):  # the messages of libraries do not help
            reason = f"{why}, and this machine's cache has none"
        missing, near = self._data.absent(self._name), self._data.nearest(self._name)
        return (
            (f"{near}\n" if near else "")
            + f"The data of {self._where}, {path}{f' ({name})' if name else ''}, cannot be read: {reason}."
            + (f" The folder of --data has no {' and no '.join(missing)}." if missing else "")
            + f"\nWhere there is a network, run {shlex.quote(sys.executable)} -c "
            f'"import datasets; datasets.load_dataset({what})" and bring '
            "its ~/.cache/huggingface here (HF_HOME says where it is);\nor put the rows into files and name them in a "
            f"map for --data:\n{self.entry()}"
        )

    def explain(self, error: Exception) -> str:
        """Return the reason why a task cannot be built."""
        unknown = isinstance(error, jinja2.UndefinedError) and re.fullmatch(r"'(\w+)' is undefined", str(error))
        if unknown and self.columns and self._config.get("process_docs") is None:
            return self._no_column(unknown[1])
        if isinstance(error, jinja2.TemplateError | KeyError) and self.columns:
            return f"{self._where}: {_in_words(error)}. Its documents have the columns {', '.join(self.columns)}"
        lacking = [key for key in ("doc_to_text", "doc_to_target", "metric_list") if key not in self._config]
        if not self.evaluated:
            lacking.append("test_split or validation_split")
        known = "class" in self._config or isinstance(error, jinja2.UndefinedError)  # a missing key is not the reason
        hint = f" It has no key {', '.join(lacking)}" if lacking and not known else ""
        return f"{self._where} cannot be built: {_in_words(error)}.{hint}"

    def _no_column(self, column: str) -> str:
        return (
            f"{self._data.describe(self._name)}: there is no column {column}, which {self._where} reads, but "
            f"{', '.join(self.columns)}. "
            f"Say in the map what it is: columns: {{{column}: ...}}"
        )


class _WithDocuments:
    """Mixin of a task's class: takes documents from `documents` before the hub."""

    documents: _Documents
    dataset: Any
    task_docs: Any = None  # set by `ConfigurableTask` when it is built

    @property
    def eval_docs(self) -> Any:
        """Documents for making and for marking requests, so that both have the same order of choices."""
        return super().eval_docs if self.task_docs is None else self.task_docs  # type: ignore[misc]

    def download(self, *arguments: Any, **settings: Any) -> None:
        """Called by lm-eval when a task is built."""
        local = self.documents.local()
        if local is not None:
            self.dataset = local
            return
        try:
            with hub.without_retries():
                super().download(*arguments, **settings)  # type: ignore[misc]
        except (UserError, MemoryError):
            raise
        except Exception as error:  # errors of the hub and requests, OSErrors, or those of a task's function
            raise UserError(self.documents.how_to_get(error)) from error


class _Splits(dict[str, datasets.Dataset]):
    def __init__(self, where: str, splits: Mapping[str, datasets.Dataset]) -> None:
        super().__init__(splits)
        self._where = where

    def __missing__(self, split: str) -> datasets.Dataset:
        raise UserError(f"{self._where} reads the split {split}, and the map has only {', '.join(self)}: add it")


def require_examples(built: Task | Group | list[Task], num_fewshot: int | None) -> None:
    """Raise UserError for a task that has too few examples for its prompts, see `Tasks.load`."""
    for task in built.get_all_tasks() if isinstance(built, Group) else built if isinstance(built, list) else [built]:
        own = task.config.num_fewshot
        wanted = own or 0 if own == 0 or num_fewshot is None else num_fewshot
        documents: _Documents = task.documents
        sampler = getattr(task, "sampler", None)
        if not wanted or sampler is None:
            continue
        there = len(sampler.df)
        split = _example_split(documents._config)
        if split in documents.lacking:
            raise UserError(
                f"{task.task_name}: its {wanted} few-shot examples are from the split {split}, which the map does not "
                f"have.{documents.meant(split or '')} Add it, or evaluate with "
                f"--num-fewshot 0:\n{documents.entry()}"
            )
        if there < wanted + (split == task.config.test_split):  # a question is no example for itself
            raise UserError(f"{task.task_name}: {wanted} few-shot examples are asked for, from {there} documents")


def _check_targets(where: str, task: ConfigurableTask, documents: _Documents) -> None:
    """Refuse targets, of all rows of files or the hub's first, that lm-eval would always mark wrong without a word."""
    config = task.config
    own = config.doc_to_choice is None or callable(config.process_results)
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or own:
        return
    # Functions may draw random numbers, whose order is lm-eval's.
    all_of_them = documents.columns and not callable(config.doc_to_choice) and not callable(config.doc_to_target)
    for index, document in enumerate(task.task_docs):
        choices, target = task.doc_to_choice(document), task.doc_to_target(document)
        # What else there is, lists of right choices and numbers of other kinds, lm-eval compares in ways of its own.
        wrong = isinstance(target, int) and not 0 <= target < len(choices)
        if wrong or (isinstance(target, str) and target not in choices):
            wanted = config.doc_to_target
            near = did_you_mean(wanted, task.features) if isinstance(wanted, str) and wanted.isidentifier() else ""
            raise UserError(
                f"{where}: the target {target!r:.80} of document {index:,}{documents.place(index)} is none of its "
                f"{len(choices)} choices. Its columns: {', '.join(task.features)}."
                f"{near if near.endswith('?') else ''}"
            )
        if not all_of_them:
            return


def _once(process_docs: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Call a task's function, which may shuffle, only once for each split, for questions and examples.

    In lm-eval the file cache of `Dataset.map` does this, which datasets in memory do not have.
    """
    done: dict[int, tuple[Any, Any]] = {}  # with the documents, so that others do not get their id

    @functools.wraps(process_docs)
    def processed(documents: Any) -> Any:
        if id(documents) not in done:
            done[id(documents)] = documents, process_docs(documents)
        return done[id(documents)][1]

    return processed


def _splits(config: Mapping[str, Any]) -> list[str]:
    """Return the splits that lm-eval may read when it builds a task."""
    found = [config.get(key) for key in ("test_split", "validation_split", "training_split")]
    return list(dict.fromkeys(split for split in (*found, _example_split(config)) if split is not None))


def _example_split(config: Mapping[str, Any]) -> str | None:
    """Return the split of few-shot examples, as `ConfigurableTask.fewshot_docs` does."""
    own = config.get("fewshot_config") or {}
    if (split := own.get("split", config.get("fewshot_split"))) is not None or own.get("samples") is not None:
        return split
    return config.get("training_split") or config.get("validation_split") or config.get("test_split")


def _in_words(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
