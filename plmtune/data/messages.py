"""The parts of a row: system, tools, history, question, messages and labels, as conversations and pairs read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from plmtune.data.rows import Message
from plmtune.data.sources import BadRow
from plmtune.errors import did_you_mean

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool", "tool_response": "tool",
    "tool_result": "tool", "ipython": "tool",
    "tools": "tools",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles of LLaMA-Factory and others, whose text is a call as JSON
MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "instruction", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output")
LABELS = ("label", "kto_tag", "kto_label", "desirable", "is_desirable", "thumbs_up", "liked")
# Keys of a message in which somebody says something: a template that leaves them out is refused.
THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")
SAID = ("tool_calls", *THOUGHTS, "tool_plan", "refusal", "train_detail", "training_detail")
_SYSTEMS = ("system", "system_prompt")
_GIVEN = ("input", "context")  # what a question is about
_TOOLS = ("tools", "functions")
OPENING = (*_SYSTEMS, *_TOOLS, "history")  # columns of which messages are made, whatever the shape
_FLAGS = ("weight", "train", "training", "trainable")
_MEDIA = tuple(
    name
    for kind in ("image", "audio", "video")
    for name in (kind, f"{kind}s", f"{kind}_path", f"{kind}_paths", f"{kind}_url", f"{kind}_urls")
)
_YES_NO = {"true": True, "false": False, "1": True, "0": False}


class Parts:
    """One row, which remembers what was read of it. A column of nothing (null) is no column.

    Attributes:
        row: its columns.
        used: names of those that were read.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        """Look at a row.

        Raises:
            BadRow: if it has images, audio or video.
        """
        self.row = {key: value for key, value in row.items() if not _is_null(value)}
        self.used: set[str] = set()
        self._nulls = row.keys() - self.row.keys()
        for key, value in self.row.items():
            if (key in _MEDIA and _is_something(value)) or _is_media(value):
                raise BadRow(f"has images, audio or video under {key}, and only text can be learned")

    def __contains__(self, key: str) -> bool:
        return key in self.row

    def take(self, key: str, setting: str = "shape") -> Any:
        """Return what stands under a key.

        Raises:
            BadRow: if the row has no such key.
        """
        if key not in self.row:
            raise BadRow(f"has no key {key}.{did_you_mean(key, map(str, self.row))} See {setting}")
        self.used.add(key)
        return self.row[key]

    def first(self, keys: Sequence[str], named: str | None = None) -> str | None:
        """Return the first of the keys that the row has; `named` stands in for all of them."""
        return next((key for key in ((named,) if named else keys) if key in self.row), None)

    def opening(self, system: str | None = None) -> list[Message]:
        """Read what comes before the first question: tools, a text of the system, the turns of a history.

        Args:
            system: key of the system's text, instead of the usual names.

        Raises:
            BadRow: if one of them is not what it should be.
        """
        opening: list[Message] = []
        for key in filter(self.__contains__, _TOOLS):
            tools = tools_of(self.take(key), key)
            if tools and opening:
                raise BadRow("has tools and functions, which are two names for one thing")
            opening += [Message("tools", json.dumps(tools, ensure_ascii=False))] if tools else []
        for key in (system,) if system else _SYSTEMS:
            if system and key not in self.row and key not in self._nulls:
                self.take(key, "system_key")  # raises, with the names that there are
            if text := self.take(key) if key in self.row else None:
                opening.append(Message("system", text_under(text, f"under {key}")))
                break
        return opening + self.history()

    def history(self) -> list[Message]:
        """Read earlier turns: a list of question and answer, or of messages, under history."""
        history = self.take("history") if "history" in self.row else []
        if isinstance(history, list) and history and all(isinstance(turn, dict) for turn in history):
            return messages_of(history)
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise BadRow("holds a history that is no list of question and answer")
        messages = []
        for number, (asked, answer) in enumerate(history, 1):
            messages.append(Message("user", text_under(asked, f"in question {number} of its history")))
            messages.append(Message("assistant", text_under(answer, f"in answer {number} of its history")))
        return messages

    def question(self, key: str, *, alone: bool = False) -> list[Message]:
        """Read a question: a text, behind it what it is about (input, context), or messages.

        Args:
            key: where it stands.
            alone: it is the whole question, as for a key that a person named.
        """
        asked = self.take(key)
        if not isinstance(asked, str):
            return self.messages(key)
        texts = [text_under(asked, f"under {key}")]
        for given in _GIVEN:
            if not alone and given != key and isinstance(self.row.get(given), str):
                text = self.take(given).strip()
                # A prompt that is put together from columns has it already, in lines of its own.
                if text and f"\n{text}\n" not in f"{texts[0]}\n":
                    texts.append(text_under(self.row[given], f"under {given}"))
        return [Message("user", "\n".join(texts))]

    def messages(self, key: str) -> list[Message]:
        """Read a list of messages."""
        value = self.take(key)
        if not isinstance(value, list) or not value:
            raise BadRow(f"holds no messages under {key}, but {'an empty list' if value == [] else _kind(value)}")
        return messages_of(value)

    def label(self) -> bool | None:
        """Return whether a label says that the answer is good; None: the row has no such label, or another kind."""
        key = self.first(LABELS)
        value = None if key is None else self.row[key]
        if isinstance(value, str):
            value = _YES_NO.get(value.strip().lower())
        if key is None or not isinstance(value, bool | int | float) or value not in (0, 1):
            return None
        self.used.add(key)
        return bool(value)

    def extra(self) -> dict[str, Any]:
        """What was not read, as far as it is JSON."""
        return {key: value for key, value in self.row.items() if key not in self.used and is_json(value)}

    def unused(self) -> tuple[str, ...]:
        """The names of all that was not read and holds something."""
        return tuple(str(key) for key, value in self.row.items() if key not in self.used and _is_something(value))


def joined(opening: list[Message], messages: list[Message]) -> list[Message]:
    """Put what a row's columns say before its messages: tools, system, history, the rest.

    Raises:
        BadRow: if a column and a message say different things for tools or system.
    """
    lead = list(takewhile(lambda message: message.role in ("tools", "system"), messages))
    heads = {message.role: message for message in opening if message.role in ("tools", "system")}
    for message in lead:
        if message.role in heads and heads[message.role].content != message.content:
            raise BadRow(f"has a column and a message of the {message.role} that differ")
    first = [*heads.values(), *(message for message in lead if message.role not in heads)]
    return [
        *sorted(first, key=lambda message: message.role != "tools"),
        *opening[len(heads) :],
        *messages[len(lead) :],
    ]


def messages_of(turns: Any) -> list[Message]:
    """Read a list of role and content, or of from and value.

    Raises:
        BadRow: for a role that is unknown, content that is no text, flags that cannot be, images.
    """
    if not isinstance(turns, list):
        raise BadRow(f"holds {_kind(turns)} in place of a list of messages")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if any(message.role == "tools" for message in messages[1:]):
        raise BadRow("has tools behind its first message")
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"holds {_kind(turn)} as turn {number}, not a message of role and content")
    held = {str(key): value for key, value in turn.items() if not _is_null(value)}
    role = held.pop("role" if "role" in held else "from", None)
    if not isinstance(role, str):
        raise BadRow(f"has no role in turn {number}: it needs role and content, or from and value")
    calling = role.lower() in _CALLS
    known = "assistant" if calling else _ROLES.get(role.lower())
    if known is None:
        raise BadRow(f"has an unknown role {role[:40]!r} in turn {number}; system, user, assistant and tool are known")
    where = f"in turn {number} ({known})"
    for key in _MEDIA:
        if _is_something(held.get(key)):
            raise BadRow(f"has images, audio or video (under {key}) {where}, and only text can be learned")
    trained = _flag(held, where)
    calls = _calls_of(held, known, where)
    name = "content" if "content" in turn and ("content" in held or "value" not in held) else "value"
    if name not in turn and not calls:
        raise BadRow(f"has no content in turn {number}")
    content = held.pop(name, None)
    masked: tuple[tuple[int, int], ...] = ()
    if calling:
        calls, content = _calls_in(content, where), ""
    elif content in (None, "", []) and (calls or known == "tool"):
        content = ""
    else:
        content, masked = _content(content, where)
    more = {key: without_nulls(value) for key, value in held.items() if _is_something(value)}
    for key, value in more.items():
        if not is_json(value):  # a time, say
            if not isinstance(value, bytes | dict | list):
                more[key] = str(value)
            else:
                raise BadRow(f"holds {_kind(value)} that is no JSON under {key[:40]} {where}")
    if calls:
        more["tool_calls"] = calls
    if known != "assistant" and (trained or masked):
        raise BadRow(f"asks to learn a turn that is not the assistant's (turn {number}, {known}): only answers are")
    if masked and sum(end - begin for begin, end in masked) == len(content):
        trained, masked = False, ()
    return Message(known, content, more, trained, masked)


def _flag(held: dict[str, Any], where: str) -> bool | None:
    """Take the flags that say whether a turn is learned: weight 0 or 1 (OpenAI), train, training, trainable."""
    found = {key: held.pop(key) for key in _FLAGS if key in held}
    for key, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            known = "0 and 1" if key == "weight" else "true and false"
            raise BadRow(f"holds {value!r:.40} under {key} {where}: {known} are known")
    if len(set(map(bool, found.values()))) > 1:
        raise BadRow(f"has {' and '.join(found)} {where}, which say different things")
    return next((bool(value) for value in found.values()), None)


def _content(value: Any, where: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a text, and of its parts those that are not to be learned."""
    if not (isinstance(value, list) and value and all(isinstance(part, dict) for part in value)):
        return text_under(value, where), ()
    text, masked = "", []
    for part in value:  # a message in parts, as chat services have it
        held = {key: inside for key, inside in part.items() if inside is not None}
        kind = held.get("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise BadRow(f"has a part of the type {str(kind)[:40]!r} {where}: only text is read, no images")
        if not isinstance(held.get("text"), str):
            raise BadRow(f"has a part without text {where}")
        begin, text = len(text), text + held["text"]
        if _flag(held, where) is False and len(text) > begin:
            masked.append((begin, len(text)))
        if unknown := [key for key in held if key not in ("type", "text", "annotations", "cache_control")]:
            raise BadRow(f"has {', '.join(map(str, unknown))[:80]} in a part {where}, which nothing reads")
    return text_under(text, where), tuple(masked)


def _calls_of(held: dict[str, Any], role: str, where: str) -> list[dict[str, Any]]:
    """Take the calls of tools from a message: tool_calls, or function_call of old."""
    calls: list[dict[str, Any]] = []
    for key in ("tool_calls", "function_call"):
        if _is_something(value := held.pop(key, None)):
            if role != "assistant":
                raise BadRow(f"has {key} {where}, which only the assistant can have")
            if calls:
                raise BadRow(f"has tool_calls and function_call {where}, which are two names for one thing")
            calls = _calls_in(value, where)
    return calls


def _calls_in(value: Any, where: str) -> list[dict[str, Any]]:
    """Read calls: {name, arguments}, or that under function, or a list of these, or JSON text of any."""
    value = _parsed(value, f"as a call of a tool {where}")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = without_nulls(_parsed(call, f"as a call of a tool {where}"))
        function = call.get("function") if isinstance(call, dict) else None
        outer = {k: v for k, v in call.items() if k not in ("function", "type")} if isinstance(function, dict) else {}
        inner = dict(function) if isinstance(function, dict) else call
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow(f"has a call of a tool without a name {where}")
        if not isinstance(function, dict):
            outer = {key: inner[key] for key in inner if key in ("id", "index")}
            inner = {key: inner[key] for key in inner if key not in ("id", "index", "type")}
        if "parameters" in inner and "arguments" not in inner:  # as Llama writes them
            inner["arguments"] = inner.pop("parameters")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except ValueError as error:
                raise BadRow(f"has a call of {inner['name'][:40]} whose arguments are no JSON {where}") from error
        if not isinstance(arguments, dict):
            raise BadRow(f"has a call of {inner['name'][:40]} whose arguments are no JSON object {where}")
        calls.append({**outer, "type": "function", "function": {**inner, "arguments": arguments}})
    return calls


def tools_of(value: Any, key: str) -> list[dict[str, Any]]:
    """Read definitions of tools as OpenAI has them, or of functions alone, or JSON text of a list of them.

    Raises:
        BadRow: if they are none.
    """
    if not _is_something(value) or (isinstance(value, str) and not value.strip()):
        return []
    value = _parsed(value, f"under {key}")
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        tool = without_nulls(_parsed(tool, f"under {key}"))
        if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}
        if not isinstance(tool, dict) or not is_json(tool):
            raise BadRow(f"holds {_kind(tool)} under {key}, not the definition of a tool")
        tools.append(tool)
    return tools


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"holds text that is no JSON {where}") from error


def text_under(value: Any, where: str) -> str:
    """Return a text.

    Raises:
        BadRow: if it is none, empty, or holds half a surrogate pair.
    """
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value, masked = _content(value, where)
        if masked:
            raise BadRow(f"has parts that are not to be learned {where}")
    if not isinstance(value, str):
        raise BadRow(f"holds {'nothing' if value is None else f'{_kind(value)}, not text,'} {where}")
    if not value or value.isspace():
        raise BadRow(f"is empty {where}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"holds half a surrogate pair {where}") from error
    return value


def texts_in(value: Any) -> Iterable[str]:
    """All texts in a value of JSON, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inside in value.items():
            yield key
            yield from texts_in(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from texts_in(inside)


def without_nulls(value: Any) -> Any:
    """Leave out keys of nothing at all depths: tables write one for each key that any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(inside) for key, inside in value.items() if inside is not None}
    return [without_nulls(inside) for inside in value] if isinstance(value, list) else value


def is_json(value: Any) -> bool:
    """Whether a value can be written as JSON."""
    if isinstance(value, list):
        return all(map(is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_json, value.values()))
    return value is None or isinstance(value, str | int | float | bool)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # pandas writes NaN for a number that is none


def _is_something(value: Any) -> bool:
    """Whether a column says anything: not null, an empty text, list or object, or a list of these."""
    if isinstance(value, list):
        return any(map(_is_something, value))
    return not _is_null(value) and value not in ("", {})


def _is_media(value: Any) -> bool:
    """Whether a value is an image or a sound as tables of `datasets` hold them."""
    if isinstance(value, list):
        return any(map(_is_media, value[:8]))
    return isinstance(value, dict) and set(value) == {"bytes", "path"} and any(value.values())


def _kind(value: Any) -> str:
    return type(value).__name__
