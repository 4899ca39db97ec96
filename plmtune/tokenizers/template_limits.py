"""Limits of a template: steps and characters are counted before they are spent, so the same template always ends.

A template is a program of unknown origin. Jinja's sandbox keeps it away from Python, and lets it double a text sixty
times. A limit of time would refuse correct templates on a slow machine, so the cost of each operation is counted:
`Limits` counts, `limited_filters` and `limited_tests` charge for filters and tests, `charge_call` for methods of texts,
numbers and lists, and `template_rewriter` puts the counting into the template itself.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from jinja2 import pass_context
from jinja2.runtime import Context
from jinja2.utils import Namespace, _PassArg

_ITEM = 32  # characters that an item of a list costs
_MOST_BITS = 4096  # of a number in arithmetic
_CHARS_A_TURN = 128  # that a template writes around a message
_STEPS_AN_ITEM = 100
# By the names of jinja's operators.
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
    "gteq": operator.ge,
}  # fmt: skip
_COMPARING = frozenset(COMPARISONS.values())

# Filters that read only the first level of their argument, at the cost of one item each.
_NO_WIDTHS = frozenset({"items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"})
_SHALLOW = _NO_WIDTHS | {"batch", "slice"}
_FREE = frozenset({"attr", "count", "d", "default", "first", "last", "length"})
# Characters that a filter costs for each character of its argument, if that is more than copying it.
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
        """Reset the counts for a conversation.

        A correct template takes a few hundred steps a turn, reads each text a few times, may look back over all turns
        from each of them, may collect its output in one text that grows by several parts a turn, and may describe each
        part of a tool in its own words.

        Args:
            turns: of the conversation, plus its tools.
            length: characters of everything that the template receives.
            items: of the lists and mappings in it.
        """
        self._turns, self._length = turns, length
        size = length + _ITEM * items + _CHARS_A_TURN * turns
        self._most_steps = self.steps = 10_000 + 500 * turns + 4 * turns**2 + length // 2 + _STEPS_AN_ITEM * items
        self._most_chars = self.chars = (1 << 20) + size * (64 + 4 * turns)

    def tick(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TemplateLimit(f"does not come to an end within {self._most_steps:,} steps {self._given()}")

    def spend(self, chars: int) -> None:
        """Count characters before they are made or read."""
        self.chars -= chars
        if self.chars < 0:
            raise TemplateLimit(f"makes or reads more than {self._most_chars:,} characters {self._given()}")

    def _given(self) -> str:
        return f"for {self._turns:,} turns with {self._length:,} characters"

    def weigh(self, value: Any, sizes: bool = False, most: int | None = None) -> int:
        """Return how many characters it costs to read all of a value; a part that occurs twice counts twice.

        Args:
            sizes: an integer costs its value, as where it may be a width.
            most: where to stop for a larger value; None: what is left.
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
                break  # the caller is about to spend it
        return total

    def compare(self, left: Any, right: Any) -> None:
        """Count what a comparison reads: at most the smaller value, of both."""
        most, last = 1 << 8, self.chars // 4  # more than that cannot be spent
        while (size := min(self.weigh(left, most=most), self.weigh(right, most=most))) > most and most < last:
            most = min(8 * most, last)
        self.spend(4 * size)

    def shallow(self, value: Any) -> int:
        """Return the cost of visiting each item of a value."""
        if isinstance(value, str | bytes):
            return len(value)
        return _ITEM * (1 + len(value)) if hasattr(value, "__len__") else _ITEM

    def counted(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yield the items of a generator and count each."""
        for item in items:
            self.spend(_ITEM)
            yield item

    def result(self, made: Any) -> Any:
        """Count the result of an operation, and return it."""
        if isinstance(made, str | bytes):
            self.spend(len(made))
        elif isinstance(made, list | tuple):
            self.spend(_ITEM * len(made))
        elif isinstance(made, Iterator):
            return self.counted(made)
        return made

    def format(self, text: str, mark: str, values: Any) -> int:
        """Return what a format makes at most.

        Args:
            mark: what begins a field: % or {.
            values: of the fields.
        """
        widths = sum(int(digits) if len(digits) < 12 else 1 << 40 for digits in _NUMBER.findall(text))
        nested = "*" in text if mark == "%" else re.search(r"\{[^}]*\{", text) is not None
        return len(text) + widths + text.count(mark) * self.weigh(values, sizes=nested)

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Count the result of an arithmetic operator."""
        if isinstance(left, str | bytes) and operator == "%":
            self.spend(self.format(left if isinstance(left, str) else left.decode("latin-1"), "%", right))
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
        """Count the cost of a method of a text, a number or a list, and the most that it makes."""
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
    """Return how many characters a replacement may add; Markup escapes the new text."""
    return (text.count(old) if old else len(text) + 1) * len(new) * (1 if text.__class__ is str else 6)


def _tags(text: Any) -> int:
    """Return the cost of removing tags from a text one after another."""
    return len(text) * text.count("<") // 8


def _levels(value: Any) -> Iterator[tuple[Any, int]]:
    """Yield a value that has been weighed and everything in it, each with its depth."""
    held = [(value, 1)]
    while held:
        one, level = held.pop()
        yield one, level
        inside = one.values() if isinstance(one, Mapping) else one if isinstance(one, list | tuple) else ()
        held += [(item, level + 1) for item in inside]


def _tojson(limits: Limits, value: Any, indent: Any, separators: Any) -> int:
    size = limits.weigh(value)
    extra = limits.weigh(separators) * size // _ITEM if separators is not None else 0
    if not indent:
        return extra
    lines = sum(level * (1 + len(one)) for one, level in _levels(value) if isinstance(one, Mapping | list | tuple))
    return extra + limits.weigh(indent, sizes=True) * lines


def _sum(limits: Limits, iterable: Any, attribute: Any = None, start: Any = 0) -> int:
    return (limits.weigh(iterable) + limits.weigh(start)) * len(iterable) if hasattr(start, "__len__") else 0


# What filters make beyond what they receive; called with the parameters of the filter.
_EXTRA: dict[str, Callable[..., int]] = {
    "format": lambda limits, value, *args, **kwargs: limits.format(str(value), "%", [args, kwargs]),
    "indent": lambda limits, s, width=4, *rest, **named: (
        (len(str(s).splitlines()) + 1) * limits.weigh(width, sizes=True)
    ),
    "join": lambda limits, value, d="", attribute=None: limits.weigh(d) * len(value),
    "pprint": lambda limits, value: 8 * max(level for _, level in _levels(value)) * limits.weigh(value),
    "replace": lambda limits, s, old, new, count=None: _replaced(
        s if isinstance(s, str) else str(s), str(old), str(new)
    ),
    "striptags": lambda limits, value: _tags(str(value)),
    "sum": _sum,
    "tojson": lambda limits, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: _tojson(
        limits, value, indent, separators
    ),
    "urlize": lambda limits, value, *args, **kwargs: len(str(value)) ** 2 // 64,
    "wordwrap": lambda limits, s, width=79, break_long_words=True, wrapstring=None, *rest, **named: (
        len(str(s)) * limits.weigh(wrapstring or "")
    ),
}
_WHOLE = frozenset({"join", "sum"})  # filters whose generators are read first


def limited_filters(limits: Limits, filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return filters that count what they do."""
    return {name: filter_ if name in _FREE else _limited(limits, name, filter_) for name, filter_ in filters.items()}


def _limited(limits: Limits, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    rate, shallow, extra = _RATES.get(name, 1), name in _SHALLOW, _EXTRA.get(name)
    sizes = name not in _NO_WIDTHS  # for these a number is no width
    passed = _PassArg.from_obj(function)
    simple = passed is None and extra is None and not shallow
    weigh, spend = limits.weigh, limits.spend

    # A filter that takes the context is not computed at compile time, even for constants.
    @pass_context
    def limited(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if simple and value.__class__ is str and not args and not kwargs:  # the most frequent call
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
