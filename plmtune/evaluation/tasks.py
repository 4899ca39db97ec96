"""lm-eval's tasks by name, with data from files or the hub, and model-written code only in a sandbox."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plmtune.errors import UserError
from plmtune.evaluation.local_data import NO_DATA, LocalData
from plmtune.evaluation.task_index import lm_eval_folder, lm_eval_index, read_folder

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from plmtune.evaluation.code_eval import CodeRunner

SUITES: dict[str, tuple[str, ...]] = {
    # Those of the PLM paper (arXiv 2503.12167); its shots are not public, so each task has its own.
    "plm": (
        "arc_challenge", "arc_easy", "mmlu", "cmmlu", "ceval-valid", "gsm8k", "mathqa",
        "humaneval", "mbpp", "boolq", "hellaswag", "logiqa", "piqa",
    ),
    # One task each for knowledge, common sense and long context, with short texts, on which a small model soon exceeds
    # chance. Tasks that generate text take hours on a CPU.
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
            include: folder with YAML files of own tasks, which replace lm-eval's of the same name.
            data: files for tasks.
            code: runs code that a model wrote; without it tasks that need it are refused.
        """
        self.data = data or NO_DATA
        self.code = code
        self._known = lm_eval_index() | (read_folder(include, strict=True) if include is not None else {})

    def resolve(self, names: Sequence[str]) -> list[str]:
        """Find tasks, groups and tags by exact names, or patterns with ``*``, ``?`` and ``[...]``.

        Each is returned once, in their order, without those that are in one of the groups or tags.
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
        folder = f"{lm_eval_folder().resolve()}/"
        found = [Listed(name, "suite", "", ", ".join(tasks)) for name, tasks in SUITES.items()]
        for name, known in sorted(self._known.items()):
            source = (known.path or f"{len(known.members)} tasks").removeprefix(folder)
            found.append(Listed(name, known.kind, known.output, source))
        return found

    @functools.cached_property
    def manager(self) -> TaskManager:
        """An empty manager: the default one reads lm-eval's tasks for 20 seconds."""
        from lm_eval.tasks import TaskManager

        return TaskManager(include_defaults=False)

    def load(self, name: str, *, num_fewshot: int | None = None) -> Task | Group | list[Task]:
        """Build a task, a group or the tasks of a tag, with its data.

        Args:
            name: from `resolve`.
            num_fewshot: examples in the prompts; None: the task's own number.
        """
        for inner in self._inside(name):
            known = self._known[inner]
            if known.code == "own":
                raise UserError(
                    f"{name}: {inner} runs code that the model writes by its own means ({known.path}), which "
                    "cannot be put into a sandbox. It is not run"
                )
            if known.code != "no" and self.code is None:
                raise UserError(f"{name} runs code that the model writes: allow it with --unsafe-code")
            self.data.check(inner)
        import numpy as np
        import torch
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        from plmtune.evaluation.task_building import Builder, require_examples
        from plmtune.training.determinism import preserve_random_state

        code = self.code if self.needs_code(name) else None
        _forget_others(code)
        with quiet(), preserve_random_state(torch.device("cpu")), code.installed() if code else nullcontext():
            # Tasks that shuffle when they are built: as in lm-eval's `simple_evaluate`, and equal on every rank.
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            built = Builder(self._known, self.data).build_named(name)
            require_examples(built, num_fewshot)
        return built

    def map_entries(self, name: str) -> list[str]:
        """Return entries of a map for `LocalData` for the tasks of a name, with their columns; no data are read."""
        from plmtune.evaluation.task_building import Builder

        with quiet():
            builder = Builder(self._known, self.data)
            inside = (self._known[inner] for inner in self._inside(name))
            return [builder.entry(known.name) for known in inside if known.kind == "task"]

    def _inside(self, name: str, seen: set[str] | None = None) -> Iterator[str]:
        """Yield a name and all known names in it."""
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
    """Make lm-eval import modules again that were imported with another runner."""
    for name, module in list(sys.modules.items()) if code is not None else ():
        held = vars(module).values() if hasattr(module, "__mtime__") else ()  # lm-eval's mark on its imports
        if any(isinstance(value, type(code)) and value is not code for value in list(held)):
            del sys.modules[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logging, printing and progress bars of lm-eval and its libraries."""
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task
    import tqdm

    held = logging.root.manager.disable
    bars = (tqdm.tqdm, lm_eval.api.task.tqdm)  # lm-eval has no option to turn its bars off
    shown = datasets.are_progress_bars_disabled()
    logging.disable(logging.CRITICAL)
    silent = functools.partial(tqdm.tqdm, disable=True)
    tqdm.tqdm, lm_eval.api.task.tqdm = silent, silent
    vars(lm_eval.api.metrics)["print"] = lambda *said, **how: None  # the message about the bootstrap
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        tqdm.tqdm, lm_eval.api.task.tqdm = bars
        logging.disable(held)
        vars(lm_eval.api.metrics).pop("print", None)
        if not shown:
            datasets.enable_progress_bars()
