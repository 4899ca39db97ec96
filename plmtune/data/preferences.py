"""Preference pairs: a prompt, the answer that is preferred and one that is not."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

from plmtune.data.conversations import REMEDY, Conversations, check_order, detect, messages_of
from plmtune.data.functions import public_functions, question
from plmtune.data.rows import Message, Refused, Rows
from plmtune.data.sources import BadRow, text_of
from plmtune.registry import register


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers.

    prompt: messages, the last of the user.
    chosen, rejected: the better and the worse answer; one of them is None where a row held only one with a label.
    place: where it stands, "FILE, line 17".
    extra: what else its row held that is JSON.
    """

    prompt: tuple[Message, ...]
    chosen: str | None
    rejected: str | None
    place: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What a round asks: messages, the last of the user, and an answer known to be good, if there is one."""

    messages: tuple[Message, ...]
    gold: str | None
    place: str
    extra: dict[str, Any] = field(default_factory=dict)


class Preferences(ABC):
    """Pairs, in an order that never changes while the data does not."""

    name: str
    refused: Refused  # what the latest reading could not use

    @abstractmethod
    def pairs(self, skip_bad: bool = False) -> Iterator[Pair]:
        """Read the pairs; what cannot be used is collected in `refused`, and without `skip_bad` raised at the end."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes when the pairs do."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line for a person."""


class PreferenceRows(Preferences):
    """See `preferences`."""

    name = "preferences"

    def __init__(self, rows: Rows, shape: str) -> None:
        self.rows = rows
        self.shape = shape
        self.refused = Refused()

    def pairs(self, skip_bad: bool = False) -> Iterator[Pair]:
        """Read the rows."""
        self.refused = Refused()
        good = 0
        for place, row in self.rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                yield pair_of(row, place, self.shape)
                good += 1
            except BadRow as error:
                self.refused.add(place, error)
        if not skip_bad:
            self.refused.raise_if_any(REMEDY, good=good)

    def fingerprint(self) -> str:
        """Hash the files, and how they are read."""
        return xxhash.xxh3_128_hexdigest(f"{self.rows.fingerprint()} {self.shape}".encode())

    def describe(self) -> str:
        """Return one line for a person."""
        return f"preferences of {self.rows.describe()}"


class InMemory(Preferences):
    """Pairs that are at hand, such as a round's."""

    def __init__(self, pairs: Iterable[Pair], name: str) -> None:
        self.name = name
        self.refused = Refused()
        self._pairs = list(pairs)

    def pairs(self, skip_bad: bool = False) -> Iterator[Pair]:
        """Give the pairs."""
        yield from self._pairs

    def fingerprint(self) -> str:
        """Hash all texts."""
        digest = xxhash.xxh3_128()
        for pair in self._pairs:
            messages = [(message.role, message.content) for message in pair.prompt]
            digest.update(json.dumps([messages, pair.chosen, pair.rejected]).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """Return one line for a person."""
        return f"{len(self._pairs):,} pairs of {self.name}"


@register("data", "preferences")
def preferences(
    paths: tuple[str, ...] = (),
    *,
    hub: str | None = None,
    split: str = "train",
    shape: Literal["auto", "strings", "messages", "sharegpt", "dialogue", "unpaired"] = "auto",
    encoding: str = "utf-8",
    max_rows: int | None = None,
) -> Preferences:
    """Read preference pairs from JSON, JSON lines, Parquet or the hub.

    Args:
        paths: files, folders or globs.
        hub: a dataset of the Hugging Face hub, instead of paths.
        split: of that dataset.
        shape: auto finds out row by row. strings: prompt (or question, or instruction with input), chosen, rejected,
            and perhaps system. messages: chosen and rejected are lists of role and content, whole conversations or
            what follows a prompt. sharegpt: conversations, then chosen and rejected as one message each
            (LLaMA-Factory). dialogue: texts with Human: and Assistant: (Anthropic's HH). unpaired: prompt,
            completion and a label, true for good ones (KTO).
        encoding: of JSON.
        max_rows: read so many rows and no more.

    Raises:
        UserError: for neither or both of paths and hub, or a path that is not there.
        ValueError: for an unknown encoding, or max_rows below 1.
    """
    return PreferenceRows(Rows(paths, hub=hub, split=split, encoding=encoding, max_rows=max_rows), shape)


@register("data", "docstring_pairs")
def docstring_pairs() -> Preferences:
    """Make pairs of the standard library: a function's own docstring is preferred to that of another one.

    The other is of about the same length, so that length tells nothing. Honest and checkable, and at hand wherever
    Python is; other data takes its place by one override.

    Raises:
        UserError: if this Python comes without its sources.
    """
    functions = sorted(public_functions(), key=lambda f: (len(f.doc), f.module, f.name))
    made = []
    for index, function in enumerate(functions):
        name = f"{function.module}.{function.name}"
        near = [f.doc for f in functions[max(0, index - 8) : index + 9] if f.doc != function.doc]
        if near:
            other = near[xxhash.xxh3_64_intdigest(name.encode()) % len(near)]
            made.append(Pair((Message("user", question(function)),), function.doc, other, f"docstring of {name}"))
    return InMemory(sorted(made, key=lambda pair: pair.place), "docstring_pairs")


def prompts_of(data: Conversations | Preferences, skip_bad: bool = False) -> Iterator[Prompt]:
    """Give the prompts of conversations or pairs, each once, with the answer that the data has for it.

    Of a conversation the prompt is all before its last answer, and that answer is the gold one; of pairs it is the
    first chosen one.
    """
    found: dict[tuple[Message, ...], Prompt] = {}
    for prompt in _prompts(data, skip_bad):
        held = found.get(prompt.messages)
        if held is None or held.gold is None:
            found[prompt.messages] = prompt
    yield from found.values()


def _prompts(data: Conversations | Preferences, skip_bad: bool) -> Iterator[Prompt]:
    if isinstance(data, Preferences):
        for pair in data.pairs(skip_bad):
            yield Prompt(pair.prompt, pair.chosen, pair.place, pair.extra)
    else:
        for held in data.conversations(skip_bad):
            yield Prompt(held.messages[:-1], held.messages[-1].content, held.place, held.extra)


_SHAPES = "prompt, chosen, rejected; conversations, chosen, rejected; prompt, completion, label"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def pair_of(row: Mapping[str, Any], place: str, shape: str = "auto") -> Pair:
    """Read one row.

    Raises:
        BadRow: if it fits no shape or not the one that is named, lacks an answer, has two equal ones, or a prompt
            whose roles are out of order or which does not end in a user's message.
    """
    found = _shape_of(row) if shape == "auto" else shape
    if found is None and _is_conversation(row):
        raise BadRow("is a conversation, not a preference pair: plmtune run sft data=conversations takes such rows")
    if found is None:
        keys = ", ".join(map(str, row)) or "none"
        raise BadRow(f"has the keys {keys:.200}, which fit no shape of preferences ({_SHAPES})")
    try:
        prompt, chosen, rejected, used = _READERS[found](row)
    except KeyError as error:
        raise BadRow(f"has no key {error.args[0]}, which the shape {found} needs") from error
    if row.get("system"):
        prompt = [Message("system", text_of(row, "system")), *prompt]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer is not None and not answer.strip():
            raise BadRow(f"has an empty {name} answer")
    _check_prompt(prompt)
    if chosen is not None and rejected is not None and chosen.strip() == rejected.strip():
        raise BadRow("has a chosen answer that equals the rejected one")
    extra = {key: value for key, value in row.items() if key not in used | {"system"} and _is_json(value)}
    return Pair(tuple(prompt), chosen, rejected, place, extra)


_Read = tuple[list[Message], str | None, str | None, set[str]]


def _shape_of(row: Mapping[str, Any]) -> str | None:
    """Tell the shape of a row by its keys and the types behind them."""
    if "chosen" in row and "rejected" in row:
        if isinstance(row["chosen"], dict):
            return "sharegpt"
        if isinstance(row["chosen"], list):
            return "messages"
        if isinstance(row["chosen"], str):
            first = row["prompt"] if isinstance(row.get("prompt"), str) else row["chosen"]
            if first.lstrip().startswith("Human:"):
                return "dialogue"
            return "strings" if _question_key(row) else None
        return None
    if "label" in row and ("messages" in row or ("prompt" in row and "completion" in row)):
        return "unpaired"
    return None


def _is_conversation(row: Mapping[str, Any]) -> bool:
    try:
        detect(dict(row))
    except BadRow:
        return False
    return "chosen" not in row and "rejected" not in row


def _question_key(row: Mapping[str, Any]) -> str | None:
    return next((key for key in ("prompt", "question", "instruction") if key in row), None)


def _read_strings(row: Mapping[str, Any]) -> _Read:
    key = _question_key(row) or "prompt"
    used = {key, "chosen", "rejected"}
    prompt = _prompt(row[key], key)
    if key == "instruction":
        used.add("input")
        if row.get("input"):
            prompt = [Message("user", f"{prompt[-1].content}\n{text_of(row, 'input')}")]
    return prompt, text_of(row, "chosen"), text_of(row, "rejected"), used


def _read_messages(row: Mapping[str, Any]) -> _Read:
    used = {"prompt", "chosen", "rejected"}
    sides = [_messages(row["chosen"], "chosen"), _messages(row["rejected"], "rejected")]
    prompts = [side[:-1] for side in sides]
    if prompts[0] != prompts[1]:
        raise BadRow("has chosen and rejected conversations that differ before their last message")
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if side[-1].role != "assistant":
            raise BadRow(f"has a {name} conversation that ends in a message of the {side[-1].role}")
    prompt = prompts[0]
    if not prompt or prompt[0].role == "assistant":
        prompt = [*_prompt(row["prompt"], "prompt"), *prompt]
    elif row.get("prompt") and isinstance(row["prompt"], list):
        given = _messages(row["prompt"], "prompt")
        if given[-len(prompt) :] == prompt:
            prompt = given
        elif given not in (prompt[: len(given)], prompt[-len(given) :]):
            prompt = [*given, *prompt]
    # A text under prompt beside whole conversations is their first question, which is in them already.
    return prompt, sides[0][-1].content, sides[1][-1].content, used


def _read_sharegpt(row: Mapping[str, Any]) -> _Read:
    key = "conversations" if "conversations" in row else "messages" if "messages" in row else "prompt"
    prompt = _prompt(row[key], key)
    answers = [_answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")]
    return prompt, answers[0], answers[1], {key, "chosen", "rejected"}


def _read_dialogue(row: Mapping[str, Any]) -> _Read:
    opening = text_of(row, "prompt") if "prompt" in row else ""
    sides = []
    for name in ("chosen", "rejected"):
        before, *turns = _TURN.split("\n\n" + (opening + text_of(row, name)).lstrip())
        if before.strip() or not turns:
            raise BadRow(f"has a {name} dialogue that does not begin with Human:")
        roles = ["user" if speaker == "Human" else "assistant" for speaker in turns[::2]]
        sides.append([Message(role, text.strip()) for role, text in zip(roles, turns[1::2], strict=True)])
    answers = [side.pop() for side in sides]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer.role != "assistant":
            raise BadRow(f"has a {name} dialogue that ends in a turn of Human:")
    if sides[0] != sides[1]:
        raise BadRow("has chosen and rejected dialogues that differ before their last answer")
    return sides[0], answers[0].content, answers[1].content, {"prompt", "chosen", "rejected"}


def _read_unpaired(row: Mapping[str, Any]) -> _Read:
    used = {"prompt", "completion", "label", "messages"}
    label = row["label"]
    if label not in (0, 1):  # True and False are 1 and 0
        raise BadRow(f"holds {label!r:.40} under label, not true or false")
    if "completion" in row:
        prompt, answer = _prompt(row["prompt"], "prompt"), _answer(row["completion"], "completion")
    else:
        *prompt, last = _messages(row["messages"], "messages")
        if last.role != "assistant":
            raise BadRow(f"has messages that end in one of the {last.role}")
        answer = last.content
    return prompt, answer if label else None, None if label else answer, used


_READERS = {
    "strings": _read_strings,
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "dialogue": _read_dialogue,
    "unpaired": _read_unpaired,
}


def _prompt(value: Any, key: str) -> list[Message]:
    """Read a prompt that is a text of the user, or messages."""
    return [Message("user", text_of({key: value}, key))] if isinstance(value, str) else _messages(value, key)


def _answer(value: Any, key: str) -> str:
    """Read an answer that is a text, one message, or a list of one message."""
    if isinstance(value, str):
        return text_of({key: value}, key)
    messages = _messages([value] if isinstance(value, dict) else value, key)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise BadRow(f"holds {', '.join(m.role for m in messages)} under {key}, not one message of the assistant")
    return messages[0].content


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"holds no messages under {key}, but {type(value).__name__}")
    return messages_of(value)


def _check_prompt(prompt: list[Message]) -> None:
    """Refuse a prompt that is not [system,] user, assistant, ..., user, or has an empty turn."""
    for number, message in enumerate(prompt, 1):
        if not message.content.strip():
            raise BadRow(f"is empty in turn {number} ({message.role}) of its prompt")
    if not prompt or prompt[-1].role != "user":
        raise BadRow("has a prompt that does not end in a user's message")
    check_order([*prompt, Message("assistant", "an answer")])


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return value is not None
