"""The metric `code_eval` of Hugging Face (arXiv 2107.03374), with a sandbox for each program and no hub."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

from plmtune.sandbox import DISK_BYTES, MEMORY_BYTES, Isolation, NoSandbox, Result, run_all, run_python

# lm-eval's task modules run this when they are imported, to check whether code may be run.
_PROBE = ("def add(a,b): return a*b", "assert add(2, 3)==5")
SECONDS = 5.0


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k samples, drawn from n of which c are right, is right.

    The unbiased estimator of arXiv 2107.03374, eq. 1.
    """
    if not 0 < k <= num_samples:
        raise ValueError(f"pass@{k} needs k from 1 to the number of samples, which is {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


class CodeRunner:
    """Runs programs against their tests, as many at a time as there are cores.

    A program with its tests runs only once.

    Args:
        isolation: "limits" has no namespaces: see `protection`.
        seconds: wall-clock limit of one program with its tests.
    """

    def __init__(self, isolation: Isolation = "namespaces", seconds: float = SECONDS) -> None:
        self.isolation: Isolation = isolation
        self.seconds = seconds
        self._known: dict[tuple[str, str], Result] = {
            _PROBE: Result(False, 1, "", "AssertionError")  # known without running: 2 * 3 is not 5
        }

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Return ({"pass@k": mean over problems}, {problem: [(number of the program, its result)]}).

        Args:
            references: of each problem, the tests.
            predictions: of each problem, whole programs.
            k: values above a problem's number of programs are left out, as in the original metric.
        """
        if len(references) != len(predictions):
            raise ValueError(f"there are {len(references)} references, but predictions for {len(predictions)} problems")
        for problem, programs in enumerate(predictions):
            if isinstance(programs, str) or not programs:
                raise ValueError(f"problem {problem} needs a list of at least one program, but has {programs!r:.80}")
        problems = list(zip(references, predictions, strict=True))
        self.run([(program, tests) for tests, programs in problems for program in programs])
        details: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for problem, (tests, programs) in enumerate(problems):
            ended = [self._known[program, tests] for program in programs]
            said = [(one.passed, "passed" if one.passed else f"failed: {one.reason}") for one in ended]
            details[problem] = [
                (number, {"task_id": problem, "passed": passed, "result": result, "completion_id": number})
                for number, (passed, result) in enumerate(said)
            ]
        counts = [(len(facts), sum(fact["passed"] for _, fact in facts)) for facts in details.values()]
        scores = {
            f"pass@{each}": sum(pass_at_k(n, c, each) for n, c in counts) / len(counts)
            for each in k
            if counts and all(n >= each for n, _ in counts)
        }
        return scores, details

    def run(self, work: Sequence[tuple[str, str]]) -> list[Result]:
        """Run pairs of (program, tests); results in their order."""
        todo = [pair for pair in dict.fromkeys(work) if pair not in self._known]
        results = run_all(todo, seconds=self.seconds, isolation=self.isolation)
        self._known |= dict(zip(todo, results, strict=True))
        return [self._known[pair] for pair in work]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let `evaluate.load("code_eval")` return this metric inside the context; other names load as before.

        If the package is not imported yet, a module of its name replaces it: the real import takes ten seconds and
        imports transformers.
        """
        before = sys.modules.get("evaluate")
        stand_in = types.ModuleType("evaluate")

        def load(path: str, *args: Any, **settings: Any) -> Any:
            nonlocal before
            if path == "code_eval":
                return self
            if before is None:
                replaced = sys.modules.get("evaluate") is stand_in
                if replaced:
                    del sys.modules["evaluate"]
                try:
                    before = importlib.import_module("evaluate")
                finally:
                    if replaced:
                        sys.modules["evaluate"] = stand_in
            return before.load(path, *args, **settings)

        vars(stand_in)["load"] = load
        sys.modules["evaluate"] = stand_in
        try:
            yield
        finally:
            del sys.modules["evaluate"]
            if before is not None:
                sys.modules["evaluate"] = before


def running_code(names: Sequence[str]) -> str:
    """Return the beginning of a sentence about these tasks."""
    return f"{', '.join(names)} run{'s' if len(names) == 1 else ''} code that the model writes"


def protection(isolation: Isolation, seconds: float = SECONDS) -> str:
    """Return lines that describe how programs are isolated from this machine, for the user's consent."""
    bounds = (
        f"Each program has {seconds:g} seconds, {MEMORY_BYTES // 2**20} MiB of memory a process, none of your "
        "environment, and limits of files, processes and threads."
    )
    if isolation == "limits":
        return (
            f"  {bounds}\n"
            "  Nothing else: the programs run as you, can read, change and delete your files, use the network, end "
            "your processes and leave some behind; and one that reads other processes' memory can forge a pass."
        )
    return (
        "  The programs run in namespaces of their own: no network, no process of this machine, no rights, and no file "
        "but Python, numpy and the system's libraries, read-only, and an empty folder of "
        f"{DISK_BYTES // 2**20} MiB in memory.\n"
        f"  {bounds}\n"
        "  Their tests run in the same process, as in HumanEval's own judge: one that searches it can forge a pass.\n"
        "  The kernel is shared: a hole in it is a hole in this."
    )


@functools.cache
def missing() -> str | None:
    """Return what this machine lacks to isolate programs, None if nothing. It is tested once."""
    try:
        ended = run_python("x = 1", tests="assert x == 1")
    except NoSandbox as error:
        return error.what
    return None if ended.passed else f"a program that is right does not pass ({ended.reason})"
