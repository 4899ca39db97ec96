"""lm-eval's tasks by name: found quickly, with data from files or the hub, and code only where it is caught."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plmtune.errors import UserError
from plmtune.evaluation.local_data import LocalData
from plmtune.evaluation.task_index import Known, lm_eval_folder, lm_eval_index, read_folder

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from plmtune.evaluation.code_eval import CodeRunner

SUITES: dict[str, tuple[str, ...]] = {
    # What the PLM paper reports (arXiv 2503.12167); its shots are not public, so each task's own stand.
    "plm": (
        "arc_challenge", "arc_easy", "mmlu", "cmmlu", "ceval-valid", "gsm8k", "mathqa",
        "humaneval", "mbpp", "boolq", "hellaswag", "logiqa", "piqa",
    ),
    # One task a faculty, each of short texts, each one on which a small model leaves chance early: knowledge, common
    # sense, text with a long context (and its perplexity). What must be written, not scored, takes hours on a CPU.
    "quick": ("arc_easy", "piqa", "lambada_openai"),
}  # fmt: skip
_SHOWN = 5  # near names


@dataclass(frozen=True)
class Listed:
    """A line of ``plmtune eval --list``: kind is suite, group, tag, task or class (a task written in Python)."""

    name: str
    kind: str
    output: str
    source: str


class Tasks:
    """Everything that can be evaluated here."""

    def __init__(
        self, *, include: Path | None = None, data: LocalData | None = None, code: CodeRunner | None = None
    ) -> None:
        """Read the names.

        Args:
            include: folder with YAML files of tasks of one's own; they take the place of lm-eval's of the same name.
            data: files for tasks.
            code: what runs code that a model wrote; without it tasks that need it are refused.

        Raises:
            UserError: if a file of `include` is wrong.
        """
        self.data = data
        self.code = code
        self._known = dict(lm_eval_index())
        if include is not None:
            self._known |= read_folder(include, strict=True)

    def resolve(self, names: Sequence[str]) -> list[str]:
        """Find tasks, groups and tags.

        Args:
            names: exact, or patterns with ``*``, ``?`` and ``[...]``.

        Returns:
            Each name once, in their order; none that a group or tag before or behind it already holds.

        Raises:
            UserError: for a name that matches nothing, with the nearest ones.
        """
        found: dict[str, None] = {}
        for name in names:
            if name in self._known:
                found[name] = None
                continue
            matches = fnmatch.filter(self._known, name) if any(sign in name for sign in "*?[") else []
            if not matches:
                raise UserError(f"There is no task {name}.{self._nearest(name)} plmtune eval --list shows all")
            found |= dict.fromkeys(sorted(matches))
        held = {inner for name in found for inner in self._inside(name) if inner != name}
        return [name for name in found if name not in held]

    def needs_code(self, name: str) -> bool:
        """Whether a task, or one in a group or tag, runs code that the model wrote."""
        return any(self._known[inner].code != "no" for inner in self._inside(name))

    def listing(self) -> list[Listed]:
        """All names, the suites first."""
        folder = str(lm_eval_folder().resolve())
        suites = [Listed(name, "suite", "", ", ".join(tasks)) for name, tasks in SUITES.items()]
        return suites + [
            Listed(
                known.name,
                known.kind,
                known.output,
                (known.path or f"{len(known.members)} tasks").removeprefix(folder + "/"),
            )
            for _, known in sorted(self._known.items())
        ]

    @functools.cached_property
    def manager(self) -> TaskManager:
        """An empty manager: another would read lm-eval's tasks again, for 20 seconds."""
        from lm_eval.tasks import TaskManager

        return TaskManager(include_defaults=False)

    def load(self, name: str, *, num_fewshot: int | None = None) -> Task | Group | list[Task]:
        """Build a task, a group or the tasks of a tag, with its data.

        Args:
            name: as `resolve` gives it.
            num_fewshot: examples that the prompts will have; None: as the task has it.

        Raises:
            UserError: if its data cannot be had (with how to get them), it is wrong, it needs code and there is no
                runner, or it lacks examples.
        """
        for inner in self._inside(name):
            self._check_code(name, self._known[inner])
            if self.data is not None:
                self.data.check(inner)
        from plmtune.evaluation.task_building import Builder, require_examples

        code = self.code if self.needs_code(name) else None
        _forget_others(code)
        with quiet(), _seeded(), code.installed() if code is not None else contextlib.nullcontext():
            built = Builder(self._known, self.data).build_named(name)
            require_examples(built, num_fewshot)
        return built

    def map_entries(self, name: str) -> list[str]:
        """Say what a map for `LocalData` would hold of each task in a name, with its columns; no data are read."""
        from plmtune.evaluation.task_building import Builder

        with quiet():
            builder = Builder(self._known, self.data)
            inside = (self._known[inner] for inner in self._inside(name))
            return [builder.entry(known.name) for known in inside if known.kind == "task"]

    def _check_code(self, name: str, known: Known) -> None:
        if known.code == "own":
            raise UserError(
                f"{name}: {known.name} runs what the model writes by means of its own ({known.path}), which cannot be "
                "put into a sandbox. It is not run"
            )
        if known.code != "no" and self.code is None:
            raise UserError(f"{name} runs code that the model writes: allow it with --unsafe-code")

    def _inside(self, name: str, seen: set[str] | None = None) -> Iterator[str]:
        """A name and all that it holds, as far as they are known."""
        seen = set() if seen is None else seen
        if name in seen or name not in self._known:
            return
        seen.add(name)
        yield name
        for member in self._known[name].members:
            yield from self._inside(member, seen)

    def _nearest(self, name: str) -> str:
        if name in SUITES:
            return f" It is a suite: --suite {name}."
        begins = [known for known in self._known if known.startswith(name)]
        near = sorted(begins, key=lambda known: (known not in SUITES["plm"], len(known), known))[:_SHOWN]
        near = near or difflib.get_close_matches(name, self._known, n=_SHOWN, cutoff=0.6)
        return f" Did you mean {' or '.join(near)}?" if near else ""


def _forget_others(code: CodeRunner | None) -> None:
    """Have lm-eval import modules again that took another runner for their metric, when they were imported."""
    for name, module in list(sys.modules.items()) if code is not None else ():
        held = vars(module).values() if hasattr(module, "__mtime__") else ()  # lm-eval's mark on what it imported
        if any(isinstance(value, type(code)) and value is not code for value in list(held)):
            del sys.modules[name]


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Have tasks that shuffle when they are built do so as under lm-eval's `simple_evaluate`, on every rank alike.

    None of them draws from torch, whose import takes longer than all else here.
    """
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, numpy = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what lm-eval and its libraries log and print, and their progress bars, off the terminal."""
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task
    import tqdm

    held = logging.root.manager.disable
    bars = (tqdm.tqdm, lm_eval.api.task.tqdm)  # lm-eval offers no way to turn its bars off
    shown = datasets.are_progress_bars_disabled()
    logging.disable(logging.CRITICAL)
    silent = functools.partial(tqdm.tqdm, disable=True)
    tqdm.tqdm, lm_eval.api.task.tqdm = silent, silent
    vars(lm_eval.api.metrics)["print"] = lambda *said, **how: None  # that it draws samples for a standard error
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        tqdm.tqdm, lm_eval.api.task.tqdm = bars
        logging.disable(held)
        vars(lm_eval.api.metrics).pop("print", None)
        if not shown:
            datasets.enable_progress_bars()
