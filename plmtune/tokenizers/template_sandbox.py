"""The sandbox of templates: jinja's, with the extensions and globals of transformers, and with `Limits`."""

from __future__ import annotations

import json
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

from plmtune.tokenizers.template_limits import BUILTIN, Limits, limited_filters, limited_tests
from plmtune.tokenizers.template_rewriter import Rewriter, counters

MAX_TEMPLATE = 1 << 16  # characters; the largest public ones have a third of that
# A prompt must not depend on the date. Llama 3's template falls back to this one where it has no clock.
_TODAY = datetime(2024, 7, 26)


class _Generation(Extension):
    """``{% generation %}``, as in transformers: marks the text that the model writes."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own name for it)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(lineno)

    def _generated(self, caller: Macro) -> str:
        text: str = caller()
        self.environment.generated(text)  # type: ignore[attr-defined]
        return text


class _Namespace(jinja2.utils.Namespace):
    """As in transformers: without names that lead to Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the name {name!r} begins with an underscore")
        super().__setitem__(name, value)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja's immutable sandbox; a template that passes a limit raises `TemplateLimit`."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        self.limits = Limits()
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        del self.globals["lipsum"], self.filters["random"]  # a prompt is the same each time
        filters: dict[str, Any] = {**self.filters, "tojson": _tojson}
        tests: dict[str, Any] = {**self.tests}
        self.filters.update(limited_filters(self.limits, filters) | counters(self.limits))
        self.tests.update(limited_tests(self.limits, tests))
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _TODAY.strftime,
            "namespace": _Namespace,
            "range": self._range,
        }
        self.restart()

    def restart(self, turns: int = 1, length: int = 0, items: int = 0) -> None:
        """Reset the counts before a rendering; see `Limits.allow`."""
        self.limits.allow(turns, length, items)
        self.written = 0  # characters
        self.spans: list[tuple[int, str]] = []  # where a {% generation %} begins, and its text

    def generated(self, text: str) -> None:
        """Record where a marked block lies."""
        self.spans.append((self.written, text))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator after its cost is counted."""
        self.limits.operate(operator, left, right)
        return super().call_binop(context, operator, left, right)

    # With these names any other can be an argument of the call.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call something after its cost is counted."""
        limits = __self.limits
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, BUILTIN) and not isinstance(owner, type):
            limits.charge_call(__obj.__name__, owner, [*args, *_given(kwargs).values()])
        elif isinstance(method := getattr(__obj, "__wrapped__", None), BuiltinMethodType):  # format, in jinja's wrapper
            limits.spend(limits.format(str(method.__self__), "{", [args, _given(kwargs)]))
        elif __obj.__class__ is not Macro:
            limits.spend(sum(limits.weigh(one) for one in (*args, *_given(kwargs).values())))
        return limits.result(super().call(__context, __obj, *args, **kwargs))

    def _range(self, *bounds: int) -> range:
        made = safe_range(*bounds)
        self.limits.tick(len(made) // 8)
        return made

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(Rewriter().visit(source), *args, **kwargs)


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call without the variables of loops, which jinja adds."""
    return (
        {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")} if kwargs else {}
    )


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja's own escapes what HTML could mistake
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))
