"""Answers that are Python code, and the tests that their rows hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

from plmtune.rounds.chains import Chain
from plmtune.sandbox import Result, run_python

_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Tests:
    """What runs after an answer's code. `begun`: code that the answer may go on from instead of writing it again."""

    code: str
    begun: str = ""
    name: str = ""  # of the function that `begun` begins


def tests_of(chain: Chain) -> Tests | None:
    """The tests in a prompt's row, in the form of HumanEval (arXiv 2107.03374) or MBPP (arXiv 2108.07732).

    HumanEval has ``test`` with a function check, ``entry_point`` and ``prompt``; MBPP has ``test_list`` and
    ``test_setup_code``. A row of one's own has ``tests``, code or a list of lines.
    """
    extra = chain.extra
    if isinstance(extra.get("test"), str) and isinstance(extra.get("entry_point"), str):
        name = extra["entry_point"]
        return Tests(f"{extra['test']}\ncheck({name})\n", str(extra.get("prompt", "")), name)
    tests = extra.get("tests", extra.get("test_list"))
    if isinstance(tests, list):
        tests = "\n".join(map(str, [extra.get("test_setup_code") or "", *tests]))
    return Tests(tests) if isinstance(tests, str) and tests.strip() else None


def code_of(text: str) -> str:
    """The code in an answer: what stands between fences, else all of it."""
    return "\n".join(_FENCE.findall(text)) or text


def verdict(text: str, tests: Tests, *, seconds: float = 5.0) -> Result:
    """Run an answer's code and its tests in a sandbox."""
    code = code_of(text)
    if tests.begun and not re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(tests.name)}\b", code, re.MULTILINE):
        code = tests.begun + code
    return run_python(code, tests=tests.code, seconds=seconds)
