"""The registry: the only road from a name in a config to code that runs.

``@register("ffn", "swiglu")`` puts a function or a class under an exact name in a group. Its signature is the
schema: parameters with a default are config keys, parameters without one are supplied by the caller at run time.
A config can name only what stands here, so it can never import or call anything else.

Two views of one truth: `load` imports the code and gives the object; `describe` reads the same signature from the
source, and `keys_of` evaluates it there. So ``plmtune ls`` and the checks of a config need no torch.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from plmtune.errors import UserError, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])

# Where built-in components live; a file there that registers something is found by itself.
PACKAGES = ("modules", "models", "losses", "optim", "data", "training", "rounds", "quantization")

_objects: dict[tuple[str, str], Callable[..., Any]] = {}
_extra_modules: list[str] = []


@dataclass(frozen=True)
class Parameter:
    """One parameter of a component, as written in its source."""

    name: str
    type: str
    default: str | None  # source text; None: supplied at run time


@dataclass(frozen=True)
class Description:
    """What ``plmtune ls`` shows of a component."""

    group: str
    name: str
    module: str
    parameters: tuple[Parameter, ...]
    doc: str
    returns: str = ""  # source text of a function's return annotation


def register(group: str, name: str) -> Callable[[F], F]:
    """Register a function or class under `name` in `group`.

    Raises:
        ValueError: if another object already has that name.
    """

    def add(target: F) -> F:
        held = _objects.get((group, name))
        # A module run twice (python -m, a reload) registers an equal object again; only a stranger is refused.
        if held is not None and (held.__module__, held.__qualname__) != (
            target.__module__,
            target.__qualname__,
        ):
            raise ValueError(f"{group} {name!r} is registered twice: {held.__module__} and {target.__module__}")
        _objects[(group, name)] = target
        return target

    return add


@dataclass(frozen=True)
class Component:
    """A registered component with its settings, not yet built: call it with the run-time parameters.

    Used as the default of a parameter it declares a nested group: ``attention: Component =
    component("attention", "mla")`` makes ``model/attention=gqa`` an override.
    """

    group: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **runtime: Any) -> Any:
        return load(self.group, self.name)(*args, **{**self.settings, **runtime})


def component(group: str, name: str, **settings: Any) -> Component:
    """Shorthand for `Component`, for defaults and for use in Python."""
    return Component(group, name, settings)


def import_module(name: str) -> None:
    """Import a user's module (``--import``), whose ``@register`` lines then count.

    Raises:
        UserError: if it cannot be imported.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--import {name}: cannot be imported ({error}). Is it on the path?") from error
    if name not in _extra_modules:
        _extra_modules.append(name)


@cache
def _entry_point_modules() -> tuple[str, ...]:
    return tuple(point.module for point in entry_points(group="plmtune.components"))


def _modules() -> list[tuple[str, Path]]:
    """(module name, source file) of every module that may register components."""
    root = Path(__file__).parent
    found = [
        (f"plmtune.{package}.{path.stem}", path)
        for package in PACKAGES
        for path in sorted((root / package).glob("*.py"))
        if path.stem != "__init__"
    ]
    for name in (*_entry_point_modules(), *_extra_modules):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found.append((name, Path(spec.origin)))
    return found


def _decorations(node: ast.stmt) -> list[tuple[str, str]]:
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return []
    pairs = []
    for call in node.decorator_list:
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == "register"
            and len(call.args) == 2
            and all(isinstance(argument, ast.Constant) for argument in call.args)
        ):
            group, name = (str(argument.value) for argument in call.args if isinstance(argument, ast.Constant))
            pairs.append((group, name))
    return pairs


def _parameters(node: ast.FunctionDef | ast.ClassDef) -> tuple[Parameter, ...]:
    function: ast.stmt | None = node
    if isinstance(node, ast.ClassDef):
        function = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if not isinstance(function, ast.FunctionDef):
        return ()
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = [*zip(positional, [*missing, *arguments.defaults], strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return tuple(
        Parameter(
            argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else "Any",
            ast.unparse(default) if default is not None else None,
        )
        for argument, default in pairs
        if argument.arg != "self"
    )


def _returns(node: ast.FunctionDef | ast.ClassDef) -> str:
    return ast.unparse(node.returns) if isinstance(node, ast.FunctionDef) and node.returns else ""


@cache
def _describe_file(module: str, path: Path) -> tuple[Description, ...]:
    text = path.read_text(encoding="utf-8")
    if "@register(" not in text:
        return ()
    return tuple(
        Description(group, name, module, _parameters(node), ast.get_docstring(node) or "", _returns(node))
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        for group, name in _decorations(node)
    )


def describe() -> dict[str, dict[str, Description]]:
    """Every component as {group: {name: description}}, read from source: imports nothing."""
    table: dict[str, dict[str, Description]] = {}
    for module, path in _modules():
        for entry in _describe_file(module, path):
            table.setdefault(entry.group, {})[entry.name] = entry
    return table


def find(group: str, name: str) -> Description:
    """Return one component's description.

    Raises:
        UserError: for an unknown group or name, with the nearest right one.
    """
    table = describe()
    if group not in table:
        raise UserError(f"There is no group {group}.{did_you_mean(group, table)}")
    if name not in table[group]:
        raise UserError(f"{group} has no component {name}.{did_you_mean(name, table[group])}")
    return table[group][name]


def load(group: str, name: str) -> Callable[..., Any]:
    """Return the registered object, importing the one module that holds it."""
    if (group, name) not in _objects:
        importlib.import_module(find(group, name).module)
    return _objects[(group, name)]


@dataclass(frozen=True)
class Key:
    """One config key: its Python type and default."""

    name: str
    type: Any
    default: Any


class _Names(dict[str, Any]):
    """What annotations and defaults of a built-in component may name: types, and constants of the same file."""

    def __init__(self, path: Path) -> None:
        super().__init__(vars(builtins))
        self.update({name: getattr(typing, name) for name in typing.__all__}, Component=Component, component=component)
        self._path = path

    def __missing__(self, name: str) -> Any:
        for node in ast.parse(self._path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                value: ast.expr = node.value  # type: ignore[attr-defined]
                self[name] = self.evaluate(ast.unparse(value))
                return self[name]
        raise NameError(f"{self._path}: {name} is no type and no constant of this file")

    def evaluate(self, source: str) -> Any:
        return eval(source, {}, self)  # the package's own source: what importing it would evaluate


def keys_in_source(entry: Description) -> dict[str, Key]:
    """Config keys of a built-in component, evaluated from its source without importing it.

    Raises:
        NameError: if its signature needs an import.
    """
    names = _Names(Path(__file__).parent.joinpath(*entry.module.split(".")[1:]).with_suffix(".py"))
    return {
        parameter.name: Key(parameter.name, names.evaluate(parameter.type), names.evaluate(parameter.default))
        for parameter in entry.parameters
        if parameter.default is not None
    }


@cache
def keys_of(group: str, name: str) -> dict[str, Key]:
    """Config keys of a component: the parameters of its signature that have a default."""
    entry = find(group, name)
    if entry.module.startswith("plmtune."):
        return keys_in_source(entry)
    target = load(group, name)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    return {
        parameter.name: Key(parameter.name, hints.get(parameter.name, Any), parameter.default)
        for parameter in inspect.signature(target).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    }
