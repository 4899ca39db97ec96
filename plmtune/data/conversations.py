"""Conversations: what system, user and assistant say, from the shapes of rows that people have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

from plmtune.data.functions import public_functions, question
from plmtune.data.rows import Message, Refused, Rows
from plmtune.data.sources import BadRow
from plmtune.errors import did_you_mean
from plmtune.ranges import NotEmpty, check
from plmtune.registry import register

REMEDY = "Mend them, or leave them out with chat.skip_bad=true"

Shape = Literal["messages", "sharegpt", "alpaca", "prompt_completion"]

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
_TOOLS = {
    "tool",
    "function",
    "function_call",
    "function_response",
    "observation",
    "tool_call",
    "tool_response",
    "ipython",
}
_MESSAGES = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "question", "instruction", "input", "query")
_COMPLETIONS = ("completion", "response", "answer", "output")
_SYSTEMS = ("system", "system_prompt")
_PAIR = "is a preference pair, not a conversation: data=preferences reads such rows, messages_key=chosen takes one side"


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends in an answer.

    messages: perhaps one of the system, then user and assistant in turn; the last is the assistant's.
    place: where it stands, "FILE, line 17".
    extra: what else its row held that is JSON.
    """

    messages: tuple[Message, ...]
    place: str
    extra: dict[str, Any] = field(default_factory=dict)


class Conversations(ABC):
    """Conversations, in an order that never changes while the data does not."""

    name: str
    refused: Refused  # what the latest reading could not use

    @abstractmethod
    def conversations(self, skip_bad: bool = False) -> Iterator[Conversation]:
        """Read them; what cannot be used is collected in `refused`, and without `skip_bad` raised at the end."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes when the conversations do."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line for a person."""


@dataclass(frozen=True)
class Keys:
    """Keys of a row that a person named, instead of the usual names."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    system: str | None = None


class ConversationRows(Conversations):
    """See `conversations`."""

    name = "conversations"

    def __init__(self, rows: Rows, shape: Literal["auto"] | Shape, keys: Keys) -> None:
        self.rows = rows
        self.shape = shape
        self.keys = keys
        self.refused = Refused()

    def conversations(self, skip_bad: bool = False) -> Iterator[Conversation]:
        """Read the rows; the first that fits a shape decides the shape of all."""
        self.refused = Refused()
        shape: Shape | None = None if self.shape == "auto" else self.shape
        good = 0
        for place, row in self.rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                shape = shape or detect(row, self.keys)
                yield conversation_of(row, place, shape, self.keys)
                good += 1
            except BadRow as error:
                self.refused.add(place, error)
        if not skip_bad:
            self.refused.raise_if_any(REMEDY, good=good)

    def fingerprint(self) -> str:
        """Hash the files, and how they are read."""
        return xxhash.xxh3_128_hexdigest(f"{self.rows.fingerprint()} {self.shape} {self.keys}".encode())

    def describe(self) -> str:
        """Return one line for a person."""
        return f"conversations of {self.rows.describe()}"


@register("data", "conversations")
def conversations(
    paths: tuple[str, ...] = (),
    *,
    hub: str | None = None,
    split: str = "train",
    shape: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto",
    messages_key: str | None = None,
    prompt_key: str | None = None,
    completion_key: str | None = None,
    system_key: str | None = None,
    encoding: str = "utf-8",
    max_rows: int | None = None,
) -> Conversations:
    """Read conversations from JSON, JSON lines, Parquet or the hub.

    Args:
        paths: files, folders or globs.
        hub: a dataset of the Hugging Face hub, instead of paths.
        split: of that dataset.
        shape: auto goes by the first row. messages: a list of role and content. sharegpt: a list of from and value.
            alpaca: instruction, input and output, perhaps history and system. prompt_completion: two texts, or two
            lists of messages, under the usual names (prompt, question, ...; completion, response, answer, ...).
        messages_key: key of the list, where it is not messages, conversations or conversation.
        prompt_key: key of the prompt, where it has another name.
        completion_key: key of the answer, where it has another name.
        system_key: key of the system's message, where it is not system or system_prompt.
        encoding: of JSON.
        max_rows: read so many rows and no more.

    Raises:
        UserError: for neither or both of paths and hub, or a path that is not there.
        ValueError: for keys that the shape has no use for, an unknown encoding, or max_rows below 1.
    """
    keys = {"messages_key": messages_key, "prompt_key": prompt_key, "completion_key": completion_key}
    check(NotEmpty(), **keys, system_key=system_key)
    lists = shape in ("messages", "sharegpt")
    if (prompt_key or completion_key) and (messages_key or shape not in ("auto", "prompt_completion")):
        raise ValueError("prompt_key and completion_key go with shape=prompt_completion")
    if messages_key and not lists and shape != "auto":
        raise ValueError(f"messages_key goes with shape=messages or sharegpt, not {shape}")
    rows = Rows(paths, hub=hub, split=split, encoding=encoding, max_rows=max_rows)
    return ConversationRows(rows, shape, Keys(messages_key, prompt_key, completion_key, system_key))


def detect(row: dict[str, Any], keys: Keys = Keys()) -> Shape:
    """Return the shape of a row.

    Raises:
        BadRow: if it fits none.
    """
    if _is_pair(row) and keys == Keys():
        raise BadRow(_PAIR)
    listed = _list_key(row, keys)
    if listed is not None:
        first = next(iter(row[listed]), None)
        return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "messages"
    named = keys.prompt or keys.completion
    # dolly has context and response where Alpaca has input and output
    if not named and "instruction" in row and ("output" in row or ("context" in row and "response" in row)):
        return "alpaca"
    if _first_key(row, keys.prompt, _PROMPTS) and _first_key(row, keys.completion, _COMPLETIONS):
        return "prompt_completion"
    held = ", ".join(map(str, list(row)[:8])) or "nothing"
    raise BadRow(f"fits no known shape of a conversation (it holds {held:.200}); see shape, prompt_key, completion_key")


def conversation_of(row: dict[str, Any], place: str, shape: Shape, keys: Keys = Keys()) -> Conversation:
    """Read one row.

    Raises:
        BadRow: if it is not of that shape, or no conversation that can be learned from.
    """
    if _is_pair(row) and keys == Keys():
        raise BadRow(_PAIR)
    if row.get("tools"):
        raise BadRow("has tools: conversations with tools are not supported")
    used: set[str] = set()
    system = keys.system or next((key for key in _SYSTEMS if isinstance(row.get(key), str)), None)
    messages = []
    if system is not None:
        text = _get(row, system, "system_key")
        used.add(system)
        if text:
            messages.append(Message("system", _text(text, f"under {system}")))
    if shape in ("messages", "sharegpt"):
        listed = _list_key(row, keys)
        if listed is None:
            raise BadRow(f"is not of the shape {shape}: it has no list under {keys.messages or ' or '.join(_MESSAGES)}")
        used.add(listed)
        messages += messages_of(row[listed])
    elif shape == "alpaca":
        messages += _alpaca(row, used)
    else:
        messages += _prompt_completion(row, keys, used)
    check_order(messages)
    extra = {key: value for key, value in row.items() if key not in used and _is_json(value)}
    return Conversation(tuple(messages), place, extra)


def messages_of(turns: Any) -> list[Message]:
    """Read a list of role and content, or of from and value.

    Raises:
        BadRow: for anything else than text of system, user and assistant.
    """
    if not isinstance(turns, list):
        raise BadRow(f"holds {type(turns).__name__} in place of a list of messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRow(f"holds {type(turn).__name__} as turn {number}, not a message of role and content")
        name, content = ("role", "content") if "role" in turn else ("from", "value")
        role = turn.get(name)
        if not isinstance(role, str):
            raise BadRow(f"has no role in turn {number}: it needs role and content, or from and value")
        known = _ROLES.get(role.lower())
        if role.lower() in _TOOLS or turn.get("tool_calls"):
            raise BadRow(f"has a turn of a tool (turn {number}): conversations with tools are not supported")
        if known is None:
            raise BadRow(f"has an unknown role {role[:40]!r} in turn {number}; system, user and assistant are known")
        if content not in turn:
            raise BadRow(f"has no {content} in turn {number}")
        messages.append(Message(known, _text(turn[content], f"in turn {number} ({known})")))
    return messages


def check_order(messages: Sequence[Message]) -> None:
    """Refuse what is no conversation: perhaps a system's message, then user and assistant in turn, ending in an answer.

    Raises:
        BadRow: which says the turn that is out of order.
    """
    if not any(message.role == "assistant" for message in messages):
        raise BadRow("has no assistant turn")
    last = None
    for number, message in enumerate(messages, 1):
        if message.role == "system":
            if number > 1:
                raise BadRow(f"has its roles out of order: turn {number} is the system's, which can only be the first")
            continue
        if message.role == last:
            raise BadRow(f"has its roles out of order: turn {number} is the {message.role}'s, as is the one before")
        if last is None and message.role == "assistant":
            raise BadRow(f"has its roles out of order: the assistant begins (turn {number}), without a user's message")
        last = message.role
    if last != "assistant":
        raise BadRow(f"ends in a {last}'s turn: the last must be the assistant's")


def _alpaca(row: dict[str, Any], used: set[str]) -> list[Message]:
    output = "output" if "output" in row else "response"
    given = "input" if "input" in row else "context"
    used |= {"instruction", given, output, "history"}
    messages = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("holds a history that is no list of question and answer")
    for number, (asked, answer) in enumerate(history, 1):
        messages.append(Message("user", _text(asked, f"in question {number} of its history")))
        messages.append(Message("assistant", _text(answer, f"in answer {number} of its history")))
    asked = _text(_get(row, "instruction", "shape"), "under instruction")
    if row.get(given):
        asked = f"{asked}\n{_text(row[given], f'under {given}')}"
    answer = _text(_get(row, output, "shape"), f"under {output}")
    return [*messages, Message("user", asked), Message("assistant", answer)]


def _prompt_completion(row: dict[str, Any], keys: Keys, used: set[str]) -> list[Message]:
    prompt, completion = _first_key(row, keys.prompt, _PROMPTS), _first_key(row, keys.completion, _COMPLETIONS)
    if prompt is None or completion is None:
        what, names = (
            (keys.prompt or " or ".join(_PROMPTS), "prompt_key")
            if prompt is None
            else (keys.completion or " or ".join(_COMPLETIONS), "completion_key")
        )
        raise BadRow(f"has no {what} (see {names})")
    used |= {prompt, completion}
    asked, answer = row[prompt], row[completion]
    if isinstance(asked, list) and isinstance(answer, list):
        return messages_of(asked + answer)
    return [
        Message("user", _text(asked, f"under {prompt}")),
        Message("assistant", _text(answer, f"under {completion}")),
    ]


def _is_pair(row: dict[str, Any]) -> bool:
    return "chosen" in row and "rejected" in row


def _list_key(row: dict[str, Any], keys: Keys) -> str | None:
    names = (keys.messages,) if keys.messages else _MESSAGES
    return next((name for name in names if isinstance(row.get(name), list)), None)


def _first_key(row: dict[str, Any], named: str | None, usual: Sequence[str]) -> str | None:
    return next((key for key in ((named,) if named else usual) if key in row), None)


def _get(row: dict[str, Any], key: str, setting: str) -> Any:
    if key not in row:
        raise BadRow(f"has no key {key}.{did_you_mean(key, map(str, row))} See {setting}")
    return row[key]


def _text(value: Any, where: str) -> str:
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        parts = [part.get("text") for part in value]  # a message in parts, as chat services have it
        value = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"{type(value).__name__}, not text,"
        raise BadRow(f"holds {kind} {where}")
    if not value or value.isspace():
        raise BadRow(f"is empty {where}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"holds half a surrogate pair {where}") from error
    return value


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_json, value.values()))
    return value is None or isinstance(value, str | int | float | bool)


class Docstrings(Conversations):
    """See `docstrings`."""

    name = "docstrings"

    def __init__(self) -> None:
        self.refused = Refused()

    def conversations(self, skip_bad: bool = False) -> Iterator[Conversation]:
        """Ask about each function; its docstring answers."""
        for function in public_functions():
            messages = (Message("user", question(function)), Message("assistant", function.doc))
            yield Conversation(messages, f"docstring of {function.module}.{function.name}")

    def fingerprint(self) -> str:
        """Hash every function and what it says."""
        return xxhash.xxh3_128_hexdigest(repr(public_functions()).encode("utf-8", "surrogatepass"))

    def describe(self) -> str:
        """Return one line for a person."""
        return f"docstrings of {len(public_functions()):,} functions of the standard library"


@register("data", "docstrings")
def docstrings() -> Conversations:
    """Ask what each public function of the standard library does; its docstring's first paragraph answers.

    Honest and checkable, and at hand wherever Python is; other data takes its place by one override.

    Raises:
        UserError: if this Python comes without its sources.
    """
    public_functions()
    return Docstrings()
