"""Public functions of the standard library and their docstrings, read from its sources."""

from __future__ import annotations

import ast
import inspect
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from plmtune.data.sources import STDLIB_SKIP
from plmtune.errors import UserError

# Not meant for users of the library, or without useful docstrings.
_SKIPPED_FOLDERS = STDLIB_SKIP | {"test", "tests", "config", "distutils"}
_LONGEST_SIGNATURE = 80
_LONGEST_ANSWER = 300
_SHORTEST_ANSWER = 12


@dataclass(frozen=True)
class Function:
    """A public function or method of the standard library; `doc` is the first paragraph of its docstring."""

    module: str
    name: str  # a method's with its class: PurePath.joinpath
    signature: str  # "(*pathsegments)"
    doc: str


def question(function: Function) -> str:
    """Return a user's question about a function."""
    return f"What does {function.module}.{function.name}{function.signature} do?"


@cache
def public_functions() -> tuple[Function, ...]:
    """List the standard library's public functions with a docstring, from its sources: nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[tuple[str, str], Function] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts or _SKIPPED_FOLDERS.intersection(parts) or any(part.startswith("_") for part in parts):
            continue
        try:
            with tokenize.open(path) as file:
                tree = ast.parse(file.read())
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for function in _functions_in(tree.body, ".".join(parts)):
            found.setdefault((function.module, function.name), function)
    if not found:
        raise UserError(
            f"data docstrings: {root} holds no Python sources (a Python without its library's text?). "
            "Use data=conversations with paths of your own"
        )
    return tuple(found[key] for key in sorted(found))


def _functions_in(body: list[ast.stmt], module: str, owner: str = "") -> Iterator[Function]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _functions_in(node.body, module, f"{owner}{node.name}.")
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if any("property" in text or text.endswith((".setter", ".deleter")) for text in decorators):
            continue
        arguments = node.args
        if owner and "staticmethod" not in decorators:  # self, or the class
            del (arguments.posonlyargs or arguments.args)[:1]
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            argument.annotation = None
        for rest in (arguments.vararg, arguments.kwarg):
            if rest is not None:
                rest.annotation = None
        signature = f"({ast.unparse(arguments)})"
        doc = _first_paragraph(ast.get_docstring(node, clean=False) or "")
        if len(signature) <= _LONGEST_SIGNATURE and _SHORTEST_ANSWER <= len(doc) <= _LONGEST_ANSWER:
            yield Function(module, owner + node.name, signature, doc)


def _first_paragraph(docstring: str) -> str:
    text = inspect.cleandoc(docstring).split("\n\n")[0]
    # A paragraph of code or a signature is no explanation.
    return "" if ">>>" in text or "->" in text else " ".join(text.split())
