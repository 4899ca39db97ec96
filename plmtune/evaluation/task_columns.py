"""Columns that a task reads, from its templates and the source of its functions; no data are needed."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes

TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")


def columns_of(config: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the columns that the task's templates and functions read, and whether these are all."""
    found: dict[str, dict[str, None]] = {}
    processed = config.get("process_docs")
    # With process_docs templates read its output.
    for text in (config.get(key) for key in TEMPLATES if processed is None):
        if not isinstance(text, str):
            continue
        if text.isidentifier():
            found.setdefault(text, {})
            continue
        try:
            tree = jinja2.Environment().parse(text)
        except jinja2.TemplateError:
            continue
        called = {id(call.node) for call in tree.find_all(nodes.Call)}
        for name in sorted(jinja2.meta.find_undeclared_variables(tree)):
            found.setdefault(name, {})
        for get in tree.find_all(nodes.Getattr):
            if isinstance(get.node, nodes.Name) and get.node.name in found and id(get) not in called:
                found[get.node.name][get.attr] = None
    keys = ("process_docs",) if processed is not None else (*TEMPLATES, "process_results")
    functions = [value for value in map(config.get, keys) if callable(value)]
    for function in functions:
        for name in _read_by(function):
            found.setdefault(name, {})
    shown = [f"{name} ({', '.join(inner)})" if inner else name for name, inner in found.items()]
    return shown, not functions


def _read_by(function: Callable[..., Any]) -> list[str]:
    """Return the columns that a function, or a function in it, reads of its arguments."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return []
    given, made = set[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            given |= {one.arg for one in node.args}
        elif isinstance(node, ast.For | ast.comprehension):
            given |= _names([node.target])
        elif isinstance(node, ast.Assign):
            made |= _names([target.value for target in node.targets if isinstance(target, ast.Subscript)])
    read = (key for node in ast.walk(tree) for value, key in _subscripts(node) if value in given - made)
    return list(dict.fromkeys(read))


def _names(expressions: list[ast.expr]) -> set[str]:
    return {one.id for one in expressions if isinstance(one, ast.Name)}


def _subscripts(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the name and the key of ``name["key"]`` and ``name.get("key")``."""
    match node:
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key)), ctx=ast.Load()):
            yield name, key
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="get"), args=[ast.Constant(value=str(key)), *_]):
            yield name, key
