"""The parts of a row that conversations and pairs read: system, tools, history, question, messages and labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from plmtune.data.messages import MEDIA, is_json, messages_of, text_under, tools_of
from plmtune.data.sources import is_null, is_something, type_name
from plmtune.errors import did_you_mean
from plmtune.tokenizers.message import BadRow, Message

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "instruction", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output")
LABELS = ("label", "kto_tag", "kto_label", "desirable", "is_desirable", "thumbs_up", "liked")
_SYSTEMS = ("system", "system_prompt")
_GIVEN = ("input", "context")  # material of a question
_TOOLS = ("tools", "functions")
OPENING = (*_SYSTEMS, *_TOOLS, "history")  # columns that become messages in every shape
_YES_NO = {"true": True, "false": False, "1": True, "0": False}


class Parts:
    """One row, which records what was read of it. A null column is no column.

    Attributes:
        row: its columns.
        used: names of the columns that were read.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        """Raise BadRow if the row has images, audio or video."""
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
        """Read what precedes the first question: tools, a system message, the turns of a history.

        Args:
            system: key of the system message, instead of the usual names.
        """
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
        """Read a question: a text, followed by its material (input, context), or messages.

        Args:
            alone: the text is the whole question.
        """
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
