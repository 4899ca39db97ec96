"""The registry: the only way from a name in a config to code that runs.

``@register("ffn", "swiglu")`` puts a function or a class under an exact name in a group. Its signature is the
schema: parameters with a default are config keys, parameters without one are supplied by the caller at run time.
A config can name only registered components, so it can never import or call anything else.

`load` imports the code and returns the object. `describe_components` reads the same signature from the source, and
`keys_of` evaluates it there, so that ``plmtune ls`` and the checks of a config need no torch. A user's module is
imported when it is named, and its components are described by `inspect`.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from plmtune.errors import UserError, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])

# Where built-in components live; a file there that registers something is found by itself.
PACKAGES = ("modules", "models", "losses", "optim", "tokenizers", "data", "training", "preference.rounds",
            "quantization")  # fmt: skip

_objects: dict[tuple[str, str], Callable[..., Any]] = {}


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
    """Register a function or class under `name` in `group`."""

    def add(target: F) -> F:
        held = _objects.get((group, name), target)
        # A module run twice (python -m, a reload) registers an equal object again; only another object is refused.
        if held.__module__ != target.__module__ or held.__qualname__ != target.__qualname__:
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
    """Import a user's module (``--import``); what it registers, itself or by what it imports, counts from then on."""
    if not all(part.isidentifier() for part in name.split(".")):
        path = Path(name)
        is_file = path.is_file() and path.suffix == ".py"
        way = f" Write --import {'.'.join(path.with_suffix('').parts)}" if is_file else ""
        raise UserError(f"--import {name!r:.80}: takes the name of a Python module, as my_parts or my_package.x.{way}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with importing(f"--import {name}"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not error.name or not f"{name}.".startswith(f"{error.name}."):
                raise
            near = did_you_mean(name, [path.stem for path in Path.cwd().glob("*.py")])
            raise UserError(f"--import {name}: there is no module {error.name} on the path or here.{near}") from error
    held = list(vars(module).values())
    if not any(f"{target.__module__}.".startswith(f"{name}.") or target in held for target in _objects.values()):
        raise UserError(
            f"--import {name}: registers no component. Put @register(GROUP, NAME) of plmtune.registry over a function "
            "or a class in it."
        )


@contextmanager
def importing(what: str) -> Iterator[None]:
    """Refuse a user's module that fails, or registers a component under the name of a built-in one."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: {_raised(error)}") from error
    _refuse_taken_names()


def _raised(error: BaseException) -> str:
    """Where a user's module failed, and how: the last line of it that ran."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")][2:]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "its import"
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}"
    return f"{place} raises {type(error).__name__} ({str(error) or 'without a message':.200})."


def _refuse_taken_names() -> None:
    """A user's component under the name of a built-in one would be found or not by the order of imports."""
    for (group, name), target in [*_objects.items()]:
        ours = _built_in().get(group, {}).get(name)
        if ours is not None and target.__module__ != ours.module:
            del _objects[group, name]
            raise UserError(
                f"{target.__module__}: registers {group} {name}, which is a component of {ours.module}. Choose another "
                "name."
            )


@cache
def _import_entry_points() -> None:
    """Import the modules of installed packages that register components (group ``plmtune.components``)."""
    for point in entry_points(group="plmtune.components"):
        try:
            with importing(f"components of {point.module} are left out"):
                importlib.import_module(point.module)
        except UserError as error:  # another package's fault must not stop every command
            from plmtune.io import terminal

            terminal.say(f"plmtune: {error}")


@cache
def _built_in() -> dict[str, dict[str, Description]]:
    """The components in `PACKAGES`, read from their source."""
    table: dict[str, dict[str, Description]] = {}
    for package in PACKAGES:
        for path in sorted(Path(__file__).parent.joinpath(*package.split(".")).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.parse(text).body if "@register(" in text else ():
                if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                    continue
                for call in node.decorator_list:
                    match call:
                        case ast.Call(ast.Name("register"), [ast.Constant(str(group)), ast.Constant(str(name))]):
                            module, doc = f"plmtune.{package}.{path.stem}", ast.get_docstring(node) or ""
                            annotation = getattr(node, "returns", None)
                            returns = ast.unparse(annotation) if annotation else ""
                            entry = Description(group, name, module, _parameters(node), doc, returns)
                            table.setdefault(group, {})[name] = entry
    return table


def _parameters(node: ast.stmt) -> tuple[Parameter, ...]:
    if isinstance(node, ast.ClassDef):
        return next((_parameters(n) for n in node.body if getattr(n, "name", "") == "__init__"), ())
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults, *arguments.kw_defaults]
    return tuple(
        Parameter(
            argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else "Any",
            ast.unparse(default) if default is not None else None,
        )
        for argument, default in zip([*positional, *arguments.kwonlyargs], defaults, strict=True)
        if argument.arg != "self"
    )


def _describe_object(group: str, name: str, target: Callable[..., Any]) -> Description:
    """The description of a registered object that is not built in: it is imported, so its signature is at hand."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError) as error:
        raise UserError(f"{target.__module__}: {group} {name} has no signature that can be read ({error}).") from None

    def text(kind: Any) -> str:
        return "" if kind is signature.empty else kind if isinstance(kind, str) else inspect.formatannotation(kind)

    def source(default: Any) -> str | None:
        if isinstance(default, Component):
            return f"component({default.group!r}, {default.name!r})"
        return None if default is inspect.Parameter.empty else repr(default)

    found = signature.parameters.values()
    parameters = tuple(Parameter(p.name, text(p.annotation) or "Any", source(p.default)) for p in found)
    doc, returns = inspect.getdoc(target) or "", text(signature.return_annotation)
    return Description(group, name, target.__module__, parameters, doc, returns)


def describe_components() -> dict[str, dict[str, Description]]:
    """Every component as {group: {name: description}}: built-in ones from their source, without importing them."""
    _import_entry_points()
    table = {group: dict(entries) for group, entries in _built_in().items()}
    for (group, name), target in _objects.items():
        if name not in table.get(group, {}):
            table.setdefault(group, {})[name] = _describe_object(group, name, target)
    return table


def find(group: str, name: str) -> Description:
    """Return one component's description."""
    table = describe_components()
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
    if name in _built_in().get(group, {}):
        return keys_in_source(entry)
    return _keys_of_object(group, name)


def _keys_of_object(group: str, name: str) -> dict[str, Key]:
    target = load(group, name)
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except (NameError, TypeError) as error:
        raise UserError(f"{target.__module__}: the types of {group} {name} cannot be read ({error}).") from None
    return {
        parameter.name: Key(parameter.name, hints.get(parameter.name, Any), parameter.default)
        for parameter in inspect.signature(target).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    }
