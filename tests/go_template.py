"""The part of Go's text/template that plmtune writes for Ollama: if, range, variables, eq, and, not, len, slice."""

import ast
import re
from collections.abc import Callable, Iterator
from typing import Any

_WORDS = re.compile(r'"(?:\\.|[^"\\])*"|[()]|:=|,|[^\s(),]+')
_CALLS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "and": lambda a, b: a and b,
    "not": lambda a: not a,
    "len": len,
    "slice": lambda held, first: held[first:],
}


def render(template: str, **data: Any) -> str:
    """The text of a template, whose trim markers are refused."""
    assert "{{-" not in template and "-}}" not in template
    parts = re.split(r"\{\{ (.*?) \}\}", template, flags=re.DOTALL)
    actions = [(bool(at % 2), part) for at, part in enumerate(parts)]
    body, rest = _block(iter(actions))
    assert rest == ""
    return "".join(body(data, {"$": data}))


Body = Callable[[Any, dict[str, Any]], Iterator[str]]


def _block(actions: Iterator[tuple[bool, str]]) -> tuple[Body, str]:
    """A list of steps until end or else, and which of them."""
    steps: list[Body] = []
    for is_action, text in actions:
        if not is_action:
            steps.append(lambda dot, names, text=text: iter([text]))  # type: ignore[misc]
        elif text == "end" or text.startswith("else"):
            return _joined(steps), text
        elif text.startswith("if "):
            steps.append(_branch(text, actions))
        elif found := re.fullmatch(r"range \$i, \$_ := (\S+)", text):
            body, end = _block(actions)
            assert end == "end"
            steps.append(_loop(found[1], body))
        elif found := re.fullmatch(r"(\$\w+) := (.*)", text):
            steps.append(_assignment(*found.groups()))
        else:
            steps.append(lambda dot, names, text=text: iter([str(_value(text, dot, names))]))  # type: ignore[misc]
    return _joined(steps), ""


def _joined(steps: list[Body]) -> Body:
    return lambda dot, names: (text for step in steps for text in step(dot, names))


def _branch(text: str, actions: Iterator[tuple[bool, str]]) -> Body:
    condition = text.removeprefix("else ").removeprefix("if ")
    then, end = _block(actions)
    other: Body = lambda dot, names: iter(())  # noqa: E731
    if end.startswith("else if "):
        other = _branch(end, actions)
    elif end == "else":
        other, end = _block(actions)
        assert end == "end"
    return lambda dot, names: (then if _value(condition, dot, names) else other)(dot, names)


def _loop(held: str, body: Body) -> Body:
    def run(dot: Any, names: dict[str, Any]) -> Iterator[str]:
        for at, item in enumerate(_value(held, dot, names)):
            yield from body(item, names | {"$i": at, "$_": item})

    return run


def _assignment(name: str, expression: str) -> Body:
    def run(dot: Any, names: dict[str, Any]) -> Iterator[str]:
        names[name] = _value(expression, dot, names)
        return iter(())

    return run


def _value(text: str, dot: Any, names: dict[str, Any]) -> Any:
    words = _WORDS.findall(text)
    found = _call(words, dot, names)
    assert not words, text
    return found


def _call(words: list[str], dot: Any, names: dict[str, Any]) -> Any:
    function = _CALLS.get(words[0])
    if function is None:
        return _operand(words, dot, names)
    words.pop(0)
    operands = []
    while words and words[0] != ")":
        operands.append(_operand(words, dot, names))
    return function(*operands)


def _operand(words: list[str], dot: Any, names: dict[str, Any]) -> Any:
    word = words.pop(0)
    if word == "(":
        found = _call(words, dot, names)
        assert words.pop(0) == ")"
        return found
    if word[0] == '"':
        return ast.literal_eval(word)
    if word.isdigit():
        return int(word)
    first, *fields = word.split(".")
    found = names[first] if first else dot
    for field in fields:
        found = found[field]
    return found
