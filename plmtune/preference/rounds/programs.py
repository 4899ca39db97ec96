"""Answers that are Python code, and the tests of their rows."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass

from plmtune.preference.rounds.chains import Chain

# Inline code is skipped, so that its second fence opens no block.
_FENCE = re.compile(r"```[^`\n]*```|```[ \t]*(?P<language>[\w+-]*)[^`\n]*\n(?P<code>.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = ("python", "python3", "py", "py3")
_BEGINS = re.compile(r"from\s|import\s|(?:async\s+)?def\s|class\s|@|[A-Za-z_]\w*\s*[:=]")  # a line of code


@dataclass(frozen=True)
class Tests:
    """Code that runs after an answer's code."""

    code: str
    begun: str = ""  # beginning of a function, which an answer may continue instead of repeating it
    before: str = ""  # its part before the function, such as imports, for an answer that repeats only the function
    name: str = ""  # of that function


def tests_of(chain: Chain) -> Tests | None:
    """The tests in a prompt's row, in the form of HumanEval (arXiv 2107.03374) or MBPP (arXiv 2108.07732).

    HumanEval has ``test`` with a function check and ``entry_point``, and its prompt begins the function; MBPP has
    ``test_list`` with ``test_setup_code``, or ``test_imports`` in its sanitized form. Other rows have ``tests``, code
    or a list of lines.
    """
    extra = chain.extra
    if isinstance(extra.get("test"), str) and isinstance(extra.get("entry_point"), str):
        name = extra["entry_point"]
        asked = [message.content for message in chain.prompt if message.role == "user"][-1:]
        begun, before = _begun([str(extra.get("prompt", "")), *asked], name)
        return Tests(f"{extra['test']}\ncheck({name})\n", begun, before, name)
    tests = extra.get("tests", extra.get("test_list"))
    if isinstance(tests, list):
        imports = extra.get("test_imports") if isinstance(extra.get("test_imports"), list) else []
        tests = "\n".join(map(str, [*(imports or []), extra.get("test_setup_code") or "", *tests]))
    return Tests(tests) if isinstance(tests, str) and tests.strip() else None


def code_of(text: str) -> str:
    """The code in an answer: its fenced blocks of Python, else those without a language, else all of it."""
    blocks = [(found["language"].lower(), found["code"]) for found in _FENCE.finditer(text) if found["code"]]
    # Beside blocks of Python, blocks without a language usually show output.
    for languages in (_PYTHON, ("",)):
        if kept := [code for language, code in blocks if language in languages]:
            return "\n".join(kept)
    return text


def program(text: str, tests: Tests) -> tuple[str, str]:
    """(the code of an answer, with the beginning that it continues; the code that runs after it)."""
    code = code_of(text)
    if not _defines(code, tests.name):
        code = tests.begun + code
    elif "from __future__" not in code:  # which must come first
        code = tests.before + code
    return code, tests.code


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(name)}\b", code, re.MULTILINE) is not None


def _begun(texts: list[str], name: str) -> tuple[str, str]:
    """The code up to the function's end in the first text that defines it, and the part before the function."""
    for text in texts:
        lines = code_of(text).rstrip().split("\n")
        if not _defines("\n".join(lines), name):
            continue
        for start in (number for number, line in enumerate(lines) if _BEGINS.match(line)):
            tree = _parse("\n".join(lines[start:]))
            for node in tree.body if tree else ():
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
                    kept = [line + "\n" for line in lines[start:]]
                    return "".join(kept), "".join(kept[:first])
    return "", ""


def _parse(code: str) -> ast.Module | None:
    """Parse code whose last function may lack a body; None if it is no code."""
    for end in ("", "\n    pass"):
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in docstrings
                return ast.parse(code + end)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None
