"""Rendering of messages by a chat template, and checks that it leaves nothing out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jinja2

from plmtune.errors import UserError
from plmtune.tokenizers.message import SAID, THOUGHTS, BadRow, Message, texts_in
from plmtune.tokenizers.template_limits import TemplateLimit
from plmtune.tokenizers.template_sandbox import MAX_TEMPLATE, Sandbox

_MAX_KINDS = 4096
Spans = list[tuple[int, str]]


class Renderer:
    """A chat template as a function of messages.

    Attributes:
        source: the Jinja text.
        variables: of the template, besides the messages.
        where: its origin, for messages.
        marked: whether it marks answers with ``{% generation %}``.
    """

    def __init__(self, source: str, variables: dict[str, Any], where: str) -> None:
        """Compile a template; UserError if it is none."""
        self.source = source
        self.variables = variables
        self.where = where
        if len(source) > MAX_TEMPLATE:
            raise UserError(f"{where} has {len(source):,} characters; a chat template has at most {MAX_TEMPLATE:,}")
        self._environment = Sandbox()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{where} is no Jinja template: {error.message} (line {error.lineno})") from error
        except TemplateLimit as error:
            raise UserError(f"{where} {error}") from error
        except Exception as error:  # in constant expressions, or nested too deeply
            raise UserError(f"{where} is no Jinja template: {type(error).__name__}: {error}") from error
        self.marked = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._drops: dict[Any, list[int]] = {}  # turns that it leaves out, by roles of the conversation

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, Spans]:
        """Return the text of messages, and the begin and text of each block that the template marks.

        Raises:
            BadRow: if the template fails on them or refuses them.
            UserError: if it passes a limit of templates.
        """
        variables, length, tools = self.variables, 0, None
        if messages and messages[0].role == "tools":
            tools, length = json.loads(messages[0].content), len(messages[0].content)
            variables, messages = variables | {"tools": tools}, messages[1:]
        said = [self._calls.said(m) if "tool_calls" in m.more else _said(m) for m in messages]
        length += sum(len(m.content) + sum(map(len, texts_in(m.more))) for m in messages)
        items = _num_items([tools, *(m.more for m in messages)])
        turns = len(said) + (len(tools) if isinstance(tools, list) else 0)
        return self._write(said, add_generation_prompt, variables, (turns, length, items))

    def tried(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str | None:
        """Return the text of messages; None if the template refuses them."""
        try:
            return self.render(messages, add_generation_prompt)[0]
        except BadRow:
            return None

    def honoured(
        self, messages: Sequence[Message], text: str, add_generation_prompt: bool = False
    ) -> tuple[list[Message], list[str]]:
        """Return the messages without the keys that the template may ignore and does, and names for these keys.

        Args:
            text: the rendering of the messages.

        Raises:
            BadRow: if it leaves out content: a whole turn, tools, calls, thoughts.
        """
        if messages and messages[0].role == "tools" and self.tried(messages[1:], add_generation_prompt) == text:
            raise BadRow("has tools, and the chat template writes none")
        keys = list(dict.fromkeys(key for message in messages for key in message.more))
        ignored: list[str] = []
        spare = [key for key in keys if key not in SAID]
        for some in (
            [spare, *([key] for key in spare)] if spare else []
        ):  # usually all are ignored, which one rendering shows
            if not ignored and self.tried(without(messages, some), add_generation_prompt) == text:
                ignored += some
        messages = without(messages, ignored) if ignored else list(messages)
        names = [f"{key} of messages" for key in ignored]
        for key in (key for key in keys if key in SAID):
            names += [f"{key} of earlier turns"] * self._is_partly_silent(messages, key, text, add_generation_prompt)
        if dropped := self._dropped(messages, add_generation_prompt):
            index = dropped[0]
            raise BadRow(f"is written by the chat template without turn {index + 1} ({messages[index].role})")
        return messages, names

    def _is_partly_silent(self, messages: Sequence[Message], key: str, text: str, add_generation_prompt: bool) -> bool:
        """Whether the template leaves out a key in earlier turns, such as thoughts; BadRow if it never writes it."""
        silent = [
            index
            for index, message in enumerate(messages)
            if (value := message.more.get(key)) is not None
            and (
                (isinstance(value, str) and not holds(text, value))
                or self.tried(without(messages, [key], [index]), add_generation_prompt) == text
            )
        ]
        for index in silent:
            last = messages[: index + 1]
            if self.tried(last) == self.tried(without(last, [key], [index])):
                known = [other for other in THOUGHTS if key in THOUGHTS and other != key and other in self.source]
                hint = f"; it writes {known[0]}" if known else ""
                raise BadRow(f"has {key} in turn {index + 1}, which the chat template does not write{hint}")
        return bool(silent)

    def _dropped(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Return the turns that the template leaves out, which depend only on the roles of the conversation."""
        kinds = tuple((m.role, bool(m.content), len(m.more.get("tool_calls", ()))) for m in messages)
        known = self._drops.get((kinds, add_generation_prompt))
        if known is None:
            names = [f"plmtune{number}turn" for number in range(len(messages))]
            renamed = [renamed_turn(message, name) for message, name in zip(messages, names, strict=True)]
            written = self.tried(renamed, add_generation_prompt)
            known = []
            for index, (message, name) in enumerate(zip(messages, names, strict=True)):
                said = [name] if message.content and message.role != "tools" else []
                said += [f"{name}call{number}x" for number in range(len(message.more.get("tool_calls", ())))]
                if written is not None and not all(part in written for part in said):
                    known.append(index)
            if len(self._drops) < _MAX_KINDS:
                self._drops[kinds, add_generation_prompt] = known
        return known

    @cached_property
    def _calls(self) -> _Calls:
        """The form in which the template accepts tool calls, found by trying one."""
        function = {"name": "plmtune_f", "arguments": {"plmtune_x": 1}}
        call = {"id": "plmtune01", "type": "function", "function": function}
        asked = {"role": "user", "content": "a"}
        for calls in (_Calls(content, as_text) for as_text in (False, True) for content in (None, "")):
            said = calls.said(Message("assistant", "", {"tool_calls": [call]}))
            try:
                text, _ = self._write([asked, said], False, self.variables, (2, 100, 10))
            except BadRow:
                continue
            # Wrong are None for missing content, Python's quotes, JSON in JSON.
            wrong = re.search(r"None|'plmtune_x'|\\\"plmtune_x", text)
            if "plmtune_x" in text.partition("plmtune_f")[2] and not wrong:
                return calls
        return _Calls("", False)  # it writes no calls

    def _write(
        self,
        said: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        variables: dict[str, Any],
        size: tuple[int, int, int],
    ) -> tuple[str, Spans]:
        environment, pieces = self._environment, []
        environment.restart(*size)
        try:
            for piece in self._template.generate(
                messages=said, add_generation_prompt=add_generation_prompt, **variables
            ):
                pieces.append(piece)
                environment.written += len(piece)
        except TemplateLimit as error:
            raise UserError(f"{self.where} {error}. A chat template has to be cheap: use another") from error
        except Exception as error:  # a template can raise any exception
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            reason = kind + next(iter(str(error).splitlines()), "")
            raise BadRow(f"is refused by the chat template ({reason:.200})") from error
        return "".join(pieces), environment.spans


@dataclass(frozen=True)
class _Calls:
    """The form of tool calls: the value for missing content, and whether arguments are JSON text or an object."""

    content: str | None
    as_text: bool

    def said(self, message: Message) -> dict[str, Any]:
        said = _said(message)
        if not message.content:
            said["content"] = self.content
        if self.as_text:
            said["tool_calls"] = [
                call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
                for call in message.more["tool_calls"]
                if (function := call["function"])
            ]
        return said


def _said(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content, **message.more}


def _num_items(value: Any) -> int:
    """Count the items of lists and mappings in a JSON value, at all depths."""
    total, held = 0, [value]
    while held:
        one = held.pop()
        if isinstance(one, dict | list):
            total += len(one)
            held += one.values() if isinstance(one, dict) else one
    return total


def without(messages: Sequence[Message], keys: Sequence[str], turns: Sequence[int] | None = None) -> list[Message]:
    """Return the messages without some keys, in all turns or in `turns`."""
    return [
        replace(message, more={key: value for key, value in message.more.items() if key not in keys})
        if turns is None or index in turns
        else message
        for index, message in enumerate(messages)
    ]


def renamed_turn(message: Message, name: str) -> Message:
    """Return the message with a name in place of its content and of the functions that it calls."""
    calls = [
        call | {"function": call["function"] | {"name": f"{name}call{number}x"}}
        for number, call in enumerate(message.more.get("tool_calls", ()))
    ]
    more = message.more | ({"tool_calls": calls} if calls else {})
    return message if message.role == "tools" else Message(message.role, name if message.content else "", more)


def holds(written: str, content: str) -> bool:
    """Whether a text contains another, except for white space."""
    return "".join(content.split()) in "".join(written.split())
