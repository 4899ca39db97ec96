"""What a template may spend: steps and characters, counted before they are used, so that the same template always ends.

A template is a program of unknown origin. Jinja's sandbox keeps it from Python, not from doubling a text sixty times.
A limit of time would refuse right templates on a slow machine, so the cost of each operation is counted instead:
`Limits` counts, `limited_filters` and `limited_tests` charge for what filters and tests do, `charge_call` for methods
of texts, numbers and lists, and `Rewriter` puts the counting into the template itself.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context, markup_join, str_join
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

_ITEM = 32  # characters that an item of a list costs
_MOST_BITS = 4096  # of a number in arithmetic
_NODES_A_STEP = 8
_CHARS_A_STEP = 256
_CALL_STEPS = 10
_CHARS_A_TURN = 128  # that a template writes around what is said
_STEPS_AN_ITEM = 100
# By the names of jinja's operators.
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
    "gteq": operator.ge,
}  # fmt: skip
_COMPARING = frozenset(_COMPARISONS.values())

# Filters that look at no more than the first level of what they get, by what a look at an item costs.
_NO_WIDTHS = frozenset({"items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"})
_SHALLOW = _NO_WIDTHS | {"batch", "slice"}
_FREE = frozenset({"attr", "count", "d", "default", "first", "last", "length"})
# Characters that a filter costs for each of what it gets, where that is more than copying them.
_RATES = {
    "dictsort": 4, "e": 6, "escape": 6, "forceescape": 6, "groupby": 4, "max": 2, "min": 2, "pprint": 8, "sort": 4,
    "striptags": 8, "string": 2, "title": 8, "tojson": 2, "unique": 2, "urlencode": 16, "wordcount": 4, "wordwrap": 64,
    "xmlattr": 8,
}  # fmt: skip
_CONSTANT_TESTS = frozenset(
    {
        "boolean", "callable", "defined", "escaped", "even", "false", "filter", "float", "integer", "iterable",
        "mapping", "none", "number", "odd", "sameas", "sequence", "string", "test", "true", "undefined",
    }
)  # fmt: skip
_FROM_THE_RIGHT = frozenset({"rfind", "rindex", "rpartition", "rsplit", "strip", "lstrip", "rstrip"})
BUILTIN = (str, bytes, int, float, list, tuple, dict, range, KeysView, ValuesView, ItemsView)
_NUMBER = re.compile(r"\d+")


class TemplateLimit(Exception):
    """A template spends more than it may."""


class Limits:
    """Counts what a rendering spends.

    Attributes:
        steps: of loops, macros and blocks that are left; one is about a microsecond.
        chars: characters that are left to be made or read; an item of a list counts as 32.
    """

    def __init__(self) -> None:
        self.allow()

    def allow(self, turns: int = 1, length: int = 0, items: int = 0) -> None:
        """Begin to count anew.

        A right template takes a few hundred steps a turn, reads each text a few times, may look back over all turns
        from each of them, may collect what it writes in one text that grows by several parts a turn, and may write each
        part of a tool in its own words.

        Args:
            turns: of the conversation, and its tools.
            length: characters of all that the template is given.
            items: of the lists and mappings in it.
        """
        self._turns, self._length = turns, length
        size = length + _ITEM * items + _CHARS_A_TURN * turns
        self._most_steps = self.steps = 10_000 + 500 * turns + 4 * turns**2 + length // 2 + _STEPS_AN_ITEM * items
        self._most_chars = self.chars = (1 << 20) + size * (64 + 4 * turns)

    def tick(self, steps: int) -> None:
        """Count steps."""
        self.steps -= steps
        if self.steps < 0:
            raise TemplateLimit(f"does not come to an end within {self._most_steps:,} steps {self._given()}")

    def spend(self, chars: int) -> None:
        """Count characters that are about to be made or read."""
        self.chars -= chars
        if self.chars < 0:
            raise TemplateLimit(f"makes or reads more than {self._most_chars:,} characters {self._given()}")

    def _given(self) -> str:
        return f"for {self._turns:,} turns with {self._length:,} characters"

    def weigh(self, value: Any, sizes: bool = False, most: int | None = None) -> int:
        """Return how many characters it costs to read all of a value; what stands in it twice counts twice.

        Args:
            sizes: an integer costs its value, as where it may be a width.
            most: a larger value is not looked at further; None: what is left.
        """
        if value.__class__ is str:
            return len(value)
        most = self.chars if most is None else most
        total, held = 0, [value]
        while held:
            one = held.pop()
            if isinstance(one, str | bytes):
                total += len(one)
            elif isinstance(one, int):
                bits = one.bit_length()
                total += (abs(one) if sizes and one.__class__ is not bool else 0) + (_ITEM if bits < 64 else bits**2)
            elif isinstance(one, Mapping):
                total += 2 * _ITEM * len(one)
                held += [*one.keys(), *one.values()] if total <= most else []
            elif isinstance(one, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
                total += _ITEM * (1 + len(one))
                held += one if total <= most else []
            elif isinstance(one, Namespace):
                total += _ITEM
                held.append(object.__getattribute__(one, "_Namespace__attrs"))
            else:
                total += _ITEM
            if total > most:
                break  # what asks is about to spend it
        return total

    def compare(self, left: Any, right: Any) -> None:
        """Count what a comparison reads: of both values no more than the smaller has."""
        most, last = 1 << 8, self.chars // 4  # more than that cannot be spent
        while (size := min(self.weigh(left, most=most), self.weigh(right, most=most))) > most and most < last:
            most = min(8 * most, last)
        self.spend(4 * size)

    def shallow(self, value: Any) -> int:
        """Return what it costs to look at each item of a value."""
        if isinstance(value, str | bytes):
            return len(value)
        return _ITEM * (1 + len(value)) if hasattr(value, "__len__") else _ITEM

    def indents(self, value: Any) -> int:
        """Return the indents of all lines of a value, of one that has been weighed, as JSON is written with them."""
        total, held = 0, [(value, 1)]
        while held:
            one, level = held.pop()
            if isinstance(one, Mapping | list | tuple):
                inside = one.values() if isinstance(one, Mapping) else one
                total += level * (1 + len(one))
                held += [(item, level + 1) for item in inside]
        return total

    def depth(self, value: Any) -> int:
        """Return how deep lists and mappings stand in each other, of a value that has been weighed."""
        deepest, held = 0, [(value, 1)]
        while held:
            one, level = held.pop()
            deepest = max(deepest, level)
            if isinstance(one, Mapping):
                held += [(item, level + 1) for item in one.values()]
            elif isinstance(one, list | tuple):
                held += [(item, level + 1) for item in one]
        return deepest

    def counted(self, items: Iterator[Any]) -> Iterator[Any]:
        """Return the items of a generator, each of which is counted."""
        for item in items:
            self.spend(_ITEM)
            yield item

    def result(self, made: Any) -> Any:
        """Count what an operation has made."""
        if isinstance(made, str | bytes):
            self.spend(len(made))
        elif isinstance(made, list | tuple):
            self.spend(_ITEM * len(made))
        elif isinstance(made, Iterator):
            return self.counted(made)
        return made

    def format(self, text: str, mark: str, values: Any) -> None:
        """Count what a format makes at most.

        Args:
            mark: what begins a field: % or {.
            values: all that is put into the fields.
        """
        widths = sum(int(digits) if len(digits) < 12 else 1 << 40 for digits in _NUMBER.findall(text))
        nested = "*" in text if mark == "%" else re.search(r"\{[^}]*\{", text) is not None
        self.spend(len(text) + widths + text.count(mark) * self.weigh(values, sizes=nested))

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Count what an arithmetic operator makes."""
        if isinstance(left, str | bytes) and operator == "%":
            self.format(left if isinstance(left, str) else left.decode("latin-1"), "%", right)
        elif operator == "*" and hasattr(left, "__len__") != hasattr(right, "__len__"):
            value, times = (left, right) if hasattr(left, "__len__") else (right, left)
            self.spend(self.shallow(value) * max(times, 0) if isinstance(times, int) else 0)
        elif hasattr(left, "__len__") or hasattr(right, "__len__"):
            escaped = 6 if left.__class__ is not right.__class__ else 1  # Markup escapes a plain text
            self.spend(escaped * (self.shallow(left) + self.shallow(right)))
        elif isinstance(left, int) and isinstance(right, int):
            bits = max(left.bit_length(), right.bit_length())
            if operator == "**":
                bits = max(bits, left.bit_length() * max(right, 0))
            if bits > _MOST_BITS:
                raise TemplateLimit(f"computes with a number of more than {_MOST_BITS:,} bits")

    def charge_call(self, name: str, owner: Any, given: Sequence[Any]) -> None:
        """Count what a method of a text, a number or a list costs, and what it makes at most."""
        size, sizes = _ITEM, isinstance(owner, str | bytes | int)
        if isinstance(owner, str | bytes):
            size = len(owner)
        elif isinstance(owner, list | tuple):
            size = self.weigh(owner)
        elif name in ("copy", "count", "index"):
            size = self.shallow(owner)
        for one in given:
            size += len(one) if one.__class__ is str else self.weigh(one, sizes)
        self.spend(size)
        if not isinstance(owner, str | bytes) or not given:
            return
        first = given[0]
        if name == "join":
            self.spend(len(owner) * (len(first) if hasattr(first, "__len__") else self.chars))
        elif name == "replace" and len(given) > 1 and isinstance(first, str | bytes):
            self.spend(_replaced(owner, first, given[1]))
        elif name == "translate":
            self.spend(len(owner) * max((self.weigh(one) for one in getattr(first, "values", list)()), default=1))
        elif name == "expandtabs" and isinstance(first, int):
            self.spend(len(owner) * max(first, 0))
        elif name in _FROM_THE_RIGHT and isinstance(first, str | bytes):
            self.spend(len(owner) * len(first) // 8)
        elif name == "striptags":
            self.spend(_tags(owner))


def _replaced(text: Any, old: Any, new: Any) -> int:
    """Return how many characters replacing may add; Markup escapes what is put in."""
    return (text.count(old) if old else len(text) + 1) * len(new) * (1 if text.__class__ is str else 6)


def _tags(text: Any) -> int:
    """Return what it costs to take tags out of a text, one after another."""
    return len(text) * text.count("<") // 8


def _lines(text: str) -> int:
    return len(text.splitlines()) + 1


# What filters make beyond what they are given; with the parameters of the filters.


def _join(limits: Limits, value: Any, d: Any = "", attribute: Any = None) -> int:
    return limits.weigh(d) * len(value)


def _replace(limits: Limits, s: Any, old: Any, new: Any, count: Any = None) -> int:
    text = s if isinstance(s, str) else str(s)
    return _replaced(text, str(old), str(new))


def _indent(limits: Limits, s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> int:
    return _lines(str(s)) * limits.weigh(width, sizes=True)


def _wordwrap(
    limits: Limits,
    s: Any,
    width: Any = 79,
    break_long_words: Any = True,
    wrapstring: Any = None,
    break_on_hyphens: Any = True,
) -> int:
    return len(str(s)) * limits.weigh(wrapstring or "")


def _format(limits: Limits, value: Any, *args: Any, **kwargs: Any) -> int:
    limits.format(str(value), "%", [args, kwargs])
    return 0


def _tojson(
    limits: Limits,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> int:
    size = limits.weigh(value)
    extra = limits.weigh(separators) * size // _ITEM if separators is not None else 0
    return extra + (limits.weigh(indent, sizes=True) * limits.indents(value) if indent else 0)


def _sum(limits: Limits, iterable: Any, attribute: Any = None, start: Any = 0) -> int:
    return (limits.weigh(iterable) + limits.weigh(start)) * len(iterable) if hasattr(start, "__len__") else 0


def _pprint(limits: Limits, value: Any) -> int:
    return 8 * limits.depth(value) * limits.weigh(value)


def _urlize(limits: Limits, value: Any, *args: Any, **kwargs: Any) -> int:
    return len(str(value)) ** 2 // 64


def _striptags(limits: Limits, value: Any) -> int:
    return _tags(str(value))


_EXTRA: dict[str, Callable[..., int]] = {
    "format": _format, "indent": _indent, "join": _join, "pprint": _pprint, "replace": _replace,
    "striptags": _striptags, "sum": _sum, "tojson": _tojson, "urlize": _urlize, "wordwrap": _wordwrap,
}  # fmt: skip
_WHOLE = frozenset({"join", "sum"})  # filters whose generators are read first


def limited_filters(limits: Limits, filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return filters that count what they do, and those that `Rewriter` puts into a template."""
    made = {name: filter_ if name in _FREE else _limited(limits, name, filter_) for name, filter_ in filters.items()}
    return made | _counters(limits)


def _limited(limits: Limits, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    rate, shallow, extra = _RATES.get(name, 1), name in _SHALLOW, _EXTRA.get(name)
    sizes = name not in _NO_WIDTHS  # numbers that the others get are no widths
    passed = _PassArg.from_obj(function)
    simple = passed is None and extra is None and not shallow
    weigh, spend = limits.weigh, limits.spend

    # With the context a call of constants is not computed when the template is compiled.
    @pass_context
    def limited(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if simple and value.__class__ is str and not args and not kwargs:  # most of what templates do
            spend(rate * len(value))
            return limits.result(function(value))
        if name in _WHOLE and isinstance(value, Iterator):
            value = list(value)
        size = len(value) if value.__class__ is str else limits.shallow(value) if shallow else weigh(value)
        cost = rate * size
        for one in (*args, *kwargs.values()) if kwargs else args:
            cost += len(one) if one.__class__ is str else weigh(one, sizes)
        spend(cost)
        if extra is not None:
            spend(extra(limits, value, *args, **kwargs))
        if passed is None:
            made = function(value, *args, **kwargs)
        else:
            first = {_PassArg.context: context, _PassArg.eval_context: context.eval_ctx}.get(
                passed, context.environment
            )
            made = function(first, value, *args, **kwargs)
        return limits.result(made)

    return limited


def limited_tests(limits: Limits, tests: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return tests that count what they read."""

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        compares = function in _COMPARING

        def test(value: Any, *args: Any) -> Any:
            if compares and len(args) == 1:
                limits.compare(value, args[0])
            else:
                limits.spend(limits.weigh(value) + sum(map(limits.weigh, args)))
            return function(value, *args)

        return test

    return {name: test if name in _CONSTANT_TESTS else limited(test) for name, test in tests.items()}


# No template can write these names.
_TICK, _CONCAT, _ADD, _READ, _COPIED, _SEARCHED, _COMPARED = (
    f"{name} (counted)" for name in ("step", "~", "+", "read", "copy", "search", "compare")
)


def _counters(limits: Limits) -> dict[str, Callable[..., Any]]:
    spend, weigh = limits.spend, limits.weigh

    # Every turn of every template comes here: hence no further calls where nothing is wrong.
    @pass_context
    def step(context: Context, steps: int) -> bool:
        limits.steps -= steps if steps.__class__ is int and steps > 0 else 1
        if limits.steps < 0:
            limits.tick(0)
        return True

    @pass_context
    def add(context: Context, parts: Any) -> Any:
        size = 0
        for part in parts:
            if part.__class__ is not str:
                compute: Any = context.environment
                made = functools.reduce(lambda left, right: compute.call_binop(context, "+", left, right), parts)
                spend(4 * weigh(made))
                return made
            size += len(part)
        limits.chars -= size
        if limits.chars < 0:
            spend(0)
        return "".join(parts)

    @pass_context
    def concat(context: Context, parts: Any) -> str:
        size = 0
        for part in parts:
            size += len(part) if part.__class__ is str else 6 * weigh(part)
        spend(size)
        return (markup_join if context.eval_ctx.autoescape else str_join)(parts)

    @pass_context
    def read(context: Context, value: Any) -> Any:
        limits.chars -= len(value) if value.__class__ is str else 4 * weigh(value)
        if limits.chars < 0:
            spend(0)
        return value

    @pass_context
    def copied(context: Context, value: Any) -> Any:
        spend(limits.shallow(value))
        return value

    @pass_context
    def searched(context: Context, value: Any) -> Any:
        if not isinstance(value, dict):
            spend(len(value) if value.__class__ is str else weigh(value))
        return value

    @pass_context
    def compared(context: Context, left: Any, right: Any, how: str) -> Any:
        limits.compare(left, right)
        return _COMPARISONS[how](left, right)

    return {
        _TICK: step, _CONCAT: concat, _ADD: add, _READ: read, _COPIED: copied, _SEARCHED: searched,
        _COMPARED: compared,
    }  # fmt: skip


def _through(name: str, node: Any) -> Any:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)


class Rewriter(NodeTransformer):
    """Puts the counting into a template: steps into what repeats, characters where Python's own operators read."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        cost = _cost(node)
        self.generic_visit(node)
        self._step(node.body, cost, node.lineno)
        if node.test is not None:  # it is computed for items that the loop leaves out, too
            node.test = nodes.And(_count(cost, node.lineno), node.test).set_lineno(node.lineno)
        return node

    def visit_Macro(self, node: Any) -> Any:
        cost = _cost(node) + _CALL_STEPS
        self.generic_visit(node)
        self._step(node.body, cost, node.lineno)
        return node

    visit_CallBlock = visit_Macro
    visit_Block = visit_Macro

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        for index, one in enumerate(node.nodes):
            counted = isinstance(one, nodes.Filter) and one.name in (_ADD, _CONCAT)
            if not counted and not isinstance(one, nodes.TemplateData | nodes.Const):
                node.nodes[index] = _through(_READ, one)
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        return _through(_CONCAT, nodes.List(node.nodes).set_lineno(node.lineno))

    def visit_Add(self, node: nodes.Add) -> Any:
        parts: list[nodes.Expr] = []
        first: nodes.Expr = node
        while isinstance(first, nodes.Add):  # a + b + c: in one operation
            parts.insert(0, first.right)
            first = first.left
        visited = [self.visit(part) for part in (first, *parts)]
        return _through(_ADD, nodes.List(visited).set_lineno(node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> Any:
        self.generic_visit(node)
        first, constant = node.ops[0], isinstance(node.expr, nodes.Const) or isinstance(node.ops[0].expr, nodes.Const)
        if len(node.ops) == 1 and first.op in _COMPARISONS and not constant:
            given = [first.expr, nodes.Const(first.op).set_lineno(node.lineno)]
            return nodes.Filter(node.expr, _COMPARED, given, [], None, None).set_lineno(node.lineno)
        sides: list[Any] = [node, *node.ops]
        searches = any(side.op in ("in", "notin") for side in node.ops)
        # A text is read no further than a constant one is long.
        if searches or not any(isinstance(side.expr, nodes.Const) for side in sides):
            for side in sides:
                if not isinstance(side.expr, nodes.Const):
                    inside = getattr(side, "op", None) in ("in", "notin")
                    side.expr = _through(_SEARCHED if inside else _READ, side.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through(_COPIED, node.node)
        elif not isinstance(node.arg, nodes.Const):
            node.arg = _through(_READ, node.arg)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> Any:
        self.generic_visit(node)
        return node if node.ctx != "load" else _through(_READ, node)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _through(_READ, node.key)
        return node

    def visit_Name(self, node: nodes.Name) -> Any:
        return _through(_READ, node) if node.name == "varargs" and node.ctx == "load" else node

    def _step(self, body: list[nodes.Node], cost: int, lineno: int) -> None:
        body.insert(0, nodes.ExprStmt(_count(cost, lineno)).set_lineno(lineno))


def _count(cost: int, lineno: int) -> Any:
    return _through(_TICK, nodes.Const(cost).set_lineno(lineno))


def _cost(node: nodes.Node) -> int:
    """Return the steps of one turn of a loop or one call of a macro: by what stands in it."""
    number = chars = 0
    for one in node.find_all((nodes.Expr, nodes.Stmt, nodes.TemplateData)):
        number += 1
        text = one.data if isinstance(one, nodes.TemplateData) else getattr(one, "value", None)
        chars += len(text) if isinstance(text, str) else 0
    return 1 + number // _NODES_A_STEP + chars // _CHARS_A_STEP
