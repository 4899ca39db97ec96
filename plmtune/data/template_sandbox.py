"""Where a chat template runs: jinja's sandbox, set up as transformers sets it up, with an end to what it may do."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

# A template is a stranger's program. A turn of a loop counts as one step, a range as its length, a call of a macro as
# more, for it takes longer. What is written has MAX_TEXT characters beside four times the conversation's. Not bounded:
# what a single filter makes, such as "x" | center(10 ** 9).
_MAX_STEPS = 200_000
_STEPS_A_CALL = 50
MAX_TEXT = 1 << 20
# A prompt must not depend on the day it is made; Llama 3 falls back to this day where no clock is at hand.
_TODAY = datetime(2024, 7, 26)


class _Generation(Extension):
    """``{% generation %}``: what stands in it is what the model writes; transformers has the same."""

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
    """As transformers': no names that lead to Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the name {name!r} begins with an underscore")
        super().__setitem__(name, value)


class Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox in which transformers runs a template too, with an end to what it may do."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _TODAY.strftime,
            "namespace": _Namespace,
            "range": self._range,
        }
        del self.globals["lipsum"], self.filters["random"]  # a prompt is the same each time
        self.restart()

    def restart(self) -> None:
        """Begin to count anew, before a rendering."""
        self._steps = 0
        self.written = 0  # characters
        self.spans: list[tuple[int, str]] = []  # where a {% generation %} begins, and its text

    def tick(self, steps: int) -> None:
        """Count a turn of a loop, or a call of a macro."""
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise jinja2.TemplateError(f"it does not come to an end (more than {_MAX_STEPS:,} steps)")

    def generated(self, text: str) -> None:
        """Keep where a marked block lies."""
        self.spans.append((self.written, text))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse products that fill memory."""
        if operator == "**" and (abs(left) > 1000 or abs(right) > 100):
            raise jinja2.exceptions.SecurityError("a power is too large")
        for value, times in ((left, right), (right, left)):
            if operator == "*" and hasattr(value, "__len__") and len(value) * times > MAX_TEXT:
                raise jinja2.exceptions.SecurityError("a product of a text or list is too long")
        return super().call_binop(context, operator, left, right)

    def _range(self, *bounds: int) -> range:
        made = safe_range(*bounds)
        self.tick(len(made))
        return made

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro)):
            steps = nodes.Const(_STEPS_A_CALL if isinstance(node, nodes.Macro) else 1)
            count = nodes.Call(nodes.EnvironmentAttribute("tick"), [steps], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))  # type: ignore[attr-defined]
        return tree


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja's own escapes what HTML could mistake
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))
