"""Reads rows of conversations and pairs in every usual shape: their columns, and the messages in these."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from plmtune.data.sources import check_unicode, is_null, is_something, type_name
from plmtune.errors import did_you_mean
from plmtune.io.untrusted import load_json
from plmtune.tokenizers.message import BadRow, Message

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "instruction", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output")
LABELS = ("label", "kto_tag", "kto_label", "desirable", "is_desirable", "thumbs_up", "liked")
PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
_SYSTEMS = ("system", "system_prompt")
_GIVEN = ("input", "context")  # material of a question
_TOOLS = ("tools", "functions")
OPENING = (*_SYSTEMS, *_TOOLS, "history")  # columns that become messages in every shape
_YES_NO = {"true": True, "false": False, "1": True, "0": False}
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool", "tool_response": "tool",
    "tool_result": "tool", "ipython": "tool",
    "tools": "tools",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles in LLaMA-Factory and others whose text is a call as JSON
_FLAGS = ("weight", "train", "training", "trainable")
MEDIA = tuple(
    name
    for kind in ("image", "audio", "video")
    for name in (kind, f"{kind}s", f"{kind}_path", f"{kind}_paths", f"{kind}_url", f"{kind}_urls")
)


def messages_of(turns: Any) -> list[Message]:
    """Read a list of role and content, or of from and value; BadRow for one that cannot be."""
    if not isinstance(turns, list):
        raise BadRow(f"holds {type_name(turns)} in place of a list of messages")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if any(message.role == "tools" for message in messages[1:]):
        raise BadRow("has tools behind its first message")
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"holds {type_name(turn)} as turn {number}, not a message of role and content")
    held = {str(key): value for key, value in turn.items() if not is_null(value)}
    role = held.pop("role" if "role" in held else "from", None)
    if not isinstance(role, str):
        raise BadRow(f"has no role in turn {number}: it needs role and content, or from and value")
    calling = role.lower() in _CALLS
    known = "assistant" if calling else _ROLES.get(role.lower())
    if known is None:
        raise BadRow(f"has an unknown role {role[:40]!r} in turn {number}; system, user, assistant and tool are known")
    where = f"in turn {number} ({known})"
    for key in MEDIA:
        if is_something(held.get(key)):
            raise BadRow(f"has images, audio or video (under {key}) {where}, and only text can be learned")
    trained = _flag(held, known, where)
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
    elif known == "tools":
        content = tools_of(content, where)
    else:
        content, masked = _content(content, where, known)
    more = {key: without_nulls(value) for key, value in held.items() if is_something(value)}
    for key, value in more.items():
        if not is_json(value):
            if isinstance(value, bytes | dict | list):
                raise BadRow(f"holds {type_name(value)} that is no JSON under {key[:40]} {where}")
            more[key] = str(value)  # a time, say
    if calls:
        more["tool_calls"] = calls
    if masked and sum(end - begin for begin, end in masked) == len(content):
        trained, masked = False, ()
    return Message(known, content, more, trained, masked)


def _flag(held: dict[str, Any], role: str, where: str) -> bool | None:
    """Remove and return the flag that a turn is trained on: weight 0 or 1 (OpenAI), train, training, trainable."""
    found = {key: held.pop(key) for key in _FLAGS if key in held}
    for key, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            known = "0 and 1" if key == "weight" else "true and false"
            raise BadRow(f"holds {value!r:.40} under {key} {where}: {known} are known")
    if len(set(map(bool, found.values()))) > 1:
        raise BadRow(f"has {' and '.join(found)} {where}, which say different things")
    if role != "assistant" and any(found.values()):
        raise BadRow(f"asks to learn what is said {where}, and only answers are learned")
    return next((bool(value) for value in found.values()), None)


def _content(value: Any, where: str, role: str = "assistant") -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a text, and the parts of an answer that are not trained on."""
    if not (isinstance(value, list) and value and all(isinstance(part, dict) for part in value)):
        return text_under(value, where), ()
    text, masked = "", []
    for part in value:  # a message in parts, as in chat APIs
        held = {key: inside for key, inside in part.items() if inside is not None}
        kind = held.get("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise BadRow(f"has a part of the type {str(kind)[:40]!r} {where}: only text is read, no images")
        if not isinstance(held.get("text"), str):
            raise BadRow(f"has a part without text {where}")
        begin, text = len(text), text + held["text"]
        trained = _flag(held, role, where)
        if trained is False and role == "assistant" and len(text) > begin:
            masked.append((begin, len(text)))
        if unknown := [key for key in held if key not in ("type", "text", "annotations", "cache_control")]:
            raise BadRow(f"has {', '.join(map(str, unknown))[:80]} in a part {where}, which nothing reads")
    return text_under(text, where), tuple(masked)


def _calls_of(held: dict[str, Any], role: str, where: str) -> list[dict[str, Any]]:
    """Remove and return the tool calls of a message: tool_calls, or the older function_call."""
    calls: list[dict[str, Any]] = []
    for key in ("tool_calls", "function_call"):
        if is_something(value := held.pop(key, None)):
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
                arguments = load_json(arguments) if arguments.strip() else {}
            except ValueError as error:
                raise BadRow(f"has a call of {inner['name'][:40]} whose arguments are no JSON {where}") from error
        if not isinstance(arguments, dict):
            raise BadRow(f"has a call of {inner['name'][:40]} whose arguments are no JSON object {where}")
        calls.append({**outer, "type": "function", "function": {**inner, "arguments": arguments}})
    return calls


def tools_of(value: Any, where: str) -> str:
    """Read definitions of tools in OpenAI's form, or of functions alone, or JSON text of a list of them.

    Returns: OpenAI's list as JSON text, equal for equal tools; "" without tools.
    """
    if not is_something(value) or (isinstance(value, str) and not value.strip()):
        return ""
    value = _parsed(value, where)
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        tool = without_nulls(_parsed(tool, where))
        if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}
        if not isinstance(tool, dict) or not is_json(tool):
            raise BadRow(f"holds {type_name(tool)} {where}, not the definition of a tool")
        tools.append(tool)
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except ValueError as error:
        raise BadRow(f"holds text that is no JSON {where}") from error


def text_under(value: Any, where: str) -> str:
    """Return `value`, or raise BadRow: if it is no text, empty, or holds half a surrogate pair."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value, masked = _content(value, where)
        if masked:
            raise BadRow(f"has parts that are not to be learned {where}")
    if not isinstance(value, str):
        raise BadRow(f"holds {type_name(value)}{', not text,' if value is not None else ''} {where}")
    if not value or value.isspace():
        raise BadRow(f"is empty {where}")
    check_unicode(value, where)
    return value


def without_nulls(value: Any) -> Any:
    """Remove null keys at all depths: tables write one for each key that any row has."""
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


class Parts:
    """One row, which records in `used` which columns were read. A null column is no column.

    Raises BadRow if the row has images, audio or video.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = {key: value for key, value in row.items() if not is_null(value)}
        self.used: set[str] = set()
        self._nulls = row.keys() - self.row.keys()
        for key, value in self.row.items():
            if (key in MEDIA and is_something(value)) or _is_media(value):
                raise BadRow(f"has images, audio or video under {key}, and only text can be learned")

    def __contains__(self, key: str) -> bool:
        return key in self.row

    def take(self, key: str, setting: str = "shape") -> Any:
        """Return the value of a key; raise BadRow if the row has no such key."""
        if key not in self.row:
            raise BadRow(f"has no key {key}.{did_you_mean(key, map(str, self.row))} See {setting}")
        self.used.add(key)
        return self.row[key]

    def first(self, keys: Sequence[str], named: str | None = None) -> str | None:
        """Return the first of the keys that the row has; `named` replaces all of them."""
        return next((key for key in ((named,) if named else keys) if key in self.row), None)

    def opening(self, system: str | None = None) -> list[Message]:
        """Read what precedes the first question: tools, a system message (`system`: its unusual key), a history."""
        opening: list[Message] = []
        for key in filter(self.__contains__, _TOOLS):
            tools = tools_of(self.take(key), f"under {key}")
            if tools and opening:
                raise BadRow("has tools and functions, which are two names for one thing")
            opening += [Message("tools", tools)] if tools else []
        for key in (system,) if system else _SYSTEMS:
            if system and key not in self.row and key not in self._nulls:
                self.take(key, "system_key")  # raises, with the names that there are
            if text := self.take(key) if key in self.row else None:
                opening.append(Message("system", text_under(text, f"under {key}")))
                break
        return joined(opening, self.history())

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
        """Read a question: messages, or a text followed by its material (input, context) unless it is `alone`."""
        asked = self.take(key)
        if not isinstance(asked, str):
            return self.messages(key)
        texts = [text_under(asked, f"under {key}")]
        for given in _GIVEN:
            if not alone and given != key and isinstance(self.row.get(given), str):
                text = self.take(given).strip()
                # A prompt that was built from columns already contains it, in lines of its own.
                if text and f"\n{text}\n" not in f"{texts[0]}\n":
                    texts.append(text_under(self.row[given], f"under {given}"))
        return [Message("user", "\n".join(texts))]

    def messages(self, key: str) -> list[Message]:
        value = self.take(key)
        if not isinstance(value, list) or not value:
            raise BadRow(f"holds no messages under {key}, but {'an empty list' if value == [] else type_name(value)}")
        return messages_of(value)

    def label(self) -> bool | None:
        """Return whether the answer is labelled good; None: the row has no label, or another kind of label."""
        for key in filter(self.__contains__, LABELS):
            value = self.row[key]
            if isinstance(value, str):
                value = _YES_NO.get(value.strip().lower())
            if isinstance(value, bool | int | float) and value in (0, 1):
                self.used.add(key)
                return bool(value)
        return None

    def extra(self) -> dict[str, Any]:
        """Return the columns that were not read, as far as they are JSON."""
        return {key: value for key, value in self.row.items() if key not in self.used and is_json(value)}

    def unused(self) -> tuple[str, ...]:
        """Return the names of columns that were not read and hold something."""
        return tuple(str(key) for key, value in self.row.items() if key not in self.used and is_something(value))


def joined(opening: list[Message], messages: list[Message]) -> list[Message]:
    """Join the messages of columns with those of the row: tools, system, history, the rest; BadRow if they differ."""
    heads, lead = (list(takewhile(lambda m: m.role in ("tools", "system"), said)) for said in (opening, messages))
    known = {message.role: message.content for message in heads}
    for message in lead:
        if known.get(message.role, message.content) != message.content:
            raise BadRow(f"has a column and a message of the {message.role} that differ")
    first = [*heads, *(message for message in lead if message.role not in known)]
    return [
        *sorted(first, key=lambda message: message.role != "tools"),
        *opening[len(heads) :],
        *messages[len(lead) :],
    ]


def _is_media(value: Any) -> bool:
    """Whether a value is an image or a sound in the form of `datasets`."""
    if isinstance(value, list):
        return any(map(_is_media, value[:8]))
    return isinstance(value, dict) and set(value) == {"bytes", "path"} and any(value.values())
