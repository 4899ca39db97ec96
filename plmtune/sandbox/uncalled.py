"""Tests that are defined and never called: calls are added, or the reason why none can be is returned."""

from __future__ import annotations

import ast
import functools
import re
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

# Tests that use one of these names select themselves what runs.
_CHOOSES = {
    *("main", "TextTestRunner", "TestLoader", "defaultTestLoader", "TestSuite", "TestResult", "makeSuite"),
    *("globals", "locals", "vars", "dir", "eval", "exec", "modules", "getmembers"),
}
_DEFINES = re.compile(r"^\s*(?:async\s+def|def|class)\s", re.MULTILINE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Around all that makes syntax trees: CPython counts their depth for all threads together, and raises a SystemError
# where two make one at a time. Warning filters are shared, too.
PARSER = threading.Lock()
_CASES = ("TestCase", "IsolatedAsyncioTestCase")


class Tests(NamedTuple):
    """Tests with the calls that were missing.

    Attributes:
        text: code to run.
        never: why no test would ever run; None: some do, or there is nothing that checks.
    """

    text: str
    never: str | None


@functools.lru_cache(maxsize=256)
def with_calls(tests: str) -> Tests:
    """Call the functions `test*`, the methods `test*` of classes `Test*`, and the unittest cases that are defined and
    never named again, as pytest and unittest do."""
    if not _DEFINES.search(tests):
        return Tests(tests, None)
    try:
        with PARSER, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(tests).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Tests(tests, None)  # running it shows the error
    named = _named(body)
    if named & _CHOOSES:
        return Tests(tests, None)
    calls, cases, lacking = [], [], []
    known_cases: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef):
            bases = {base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases}
            is_case = bool(bases & {*_CASES, *known_cases})
            known_cases |= {node.name} if is_case else set()
            own = [each for each in node.body if isinstance(each, _FUNCTIONS)]
            methods = [each for each in own if each.name.startswith("test") or (is_case and each.name == "runTest")]
            if node.name in named:
                continue
            if is_case and (methods or bases & known_cases):
                cases.append(node.name)
            elif node.name.startswith("Test") and methods:
                if _is_plain(node) and not any(_lacks(each, 1) for each in methods):
                    calls += [_call(f"{node.name}().{each.name}()", each) for each in methods]
                else:
                    lacking.append(node.name)
        elif isinstance(node, _FUNCTIONS) and node.name.startswith("test") and node.name not in named:
            if _lacks(node, 0):
                lacking.append(node.name)
            else:
                calls.append(_call(f"{node.name}()", node))
    if cases:
        calls.append(f"__import__('unittest').main(argv=['tests'], defaultTest={cases!r})")
    if lacking:
        return Tests(tests, f"{lacking[0]} needs arguments or a set-up that only pytest provides, and nothing calls it")
    if not calls and not any(_runs(node) for node in body):
        unrun = [node.name for node in body if isinstance(node, _DEFINITIONS) and _checks(node)]
        first = [name for name in unrun if name not in named] or unrun
        return Tests(tests, f"they define {first[0]} and call nothing" if first else None)
    return Tests("\n".join([tests, *calls]) + "\n" if calls else tests, None)


def _named(body: list[ast.stmt]) -> set[str]:
    """The names, attributes and strings that tests use, except a definition's own name and its bases."""
    found: set[str] = set()
    for node in body:
        own = node.name if isinstance(node, _DEFINITIONS) else None
        bases = {id(base) for base in node.bases} if isinstance(node, ast.ClassDef) else set()
        for each in ast.walk(node):
            name = getattr(each, "id", None) or getattr(each, "attr", None) or getattr(each, "value", None)
            if isinstance(each, ast.Name | ast.Attribute | ast.Constant) and isinstance(name, str):
                found |= {name} - {own} if id(each) not in bases else set()
            elif isinstance(each, ast.ImportFrom) and each.module == "unittest":
                found |= {alias.name for alias in each.names if alias.name == "main"}
    return found


def _lacks(function: ast.FunctionDef | ast.AsyncFunctionDef, given: int) -> bool:
    """Whether a function needs more arguments than are given, and has no decorator that may give them."""
    a = function.args
    needed = len(a.posonlyargs) + len(a.args) - len(a.defaults) + sum(default is None for default in a.kw_defaults)
    return needed > given and not function.decorator_list


def _is_plain(node: ast.ClassDef) -> bool:
    """Whether a class needs no arguments, and its methods no set-up."""
    return not node.bases and not any(
        isinstance(each, _FUNCTIONS) and each.name.startswith(("__init__", "setup", "teardown", "setUp", "tearDown"))
        for each in node.body
    )


def _call(call: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"__import__('asyncio').run({call})" if isinstance(function, ast.AsyncFunctionDef) else call


def _runs(node: ast.stmt) -> bool:
    """Whether a statement of a module calls something: it is no definition, import, or plain assignment."""
    if isinstance(node, ast.ClassDef):
        return bool(node.decorator_list) or any(_runs(each) for each in node.body)
    if isinstance(node, _FUNCTIONS):
        return bool(node.decorator_list)
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Pass):
        return False
    if isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign):
        return any(isinstance(each, ast.Call | ast.Await) for each in _outside_lambdas(node))
    return True


def _outside_lambdas(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, ast.Lambda):
        for each in ast.iter_child_nodes(node):
            yield from _outside_lambdas(each)


def _checks(node: ast.stmt) -> bool:
    """Whether a statement contains a check."""
    return any(
        isinstance(each, ast.Assert | ast.Raise)
        or (isinstance(each, ast.Attribute) and each.attr.lower().startswith("assert"))
        for each in ast.walk(node)
    )
