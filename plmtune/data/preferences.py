"""Preference pairs, read from rows of every usual shape: a prompt, the answer that is preferred and one that is not."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import xxhash

from plmtune.data.conversations import Conversations, detect, public_functions
from plmtune.data.messages import COMPLETIONS, LABELS, MESSAGES, PROMPTS, Parts, joined, messages_of
from plmtune.data.rows import FromRows, Refused, Rows
from plmtune.data.sources import Dataset, text_of
from plmtune.registry import register
from plmtune.tokenizers.message import SAID, BadRow, Message

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers, or with one where a row held only one with a label."""

    prompt: tuple[Message, ...]  # the last message is of the user or of a tool
    chosen: str | None  # the better answer
    rejected: str | None
    place: str  # "FILE, line 17"
    extra: dict[str, Any] = field(default_factory=dict)  # the other columns of its row, as far as they are JSON
    more: dict[Side, dict[str, Any]] = field(default_factory=dict)  # keys of answers, as `Message.more`: calls, ...
    unused: tuple[str, ...] = field(default=(), compare=False)  # the columns that nothing reads

    def answer(self, name: Side) -> Message | None:
        """Return an answer as a message, if there is one."""
        text = self.chosen if name == "chosen" else self.rejected
        return None if text is None else Message("assistant", text, self.more.get(name, {}))

    @property
    def shows_all(self) -> bool:
        """Whether the answers are text alone: neither has calls or thoughts beside its text."""
        return not any(key in SAID for more in self.more.values() for key in more)


_SHAPES = "prompt, chosen, rejected; conversations, chosen, rejected; prompt, completion, label"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def pair_of(row: Mapping[str, Any], place: str, shape: str = "auto") -> Pair:
    """Read one row; BadRow if it fits no shape or not the one that is named, or holds no pair to learn from."""
    parts = _unfolded(Parts(dict(row)))
    found = _shape_of(parts) if shape == "auto" else shape
    if found is None:
        keys = ", ".join(map(str, parts.row)) or "none"
        no_shape = BadRow(f"has the keys {keys:.200}, which fit no shape of preferences ({_SHAPES})")
        if "chosen" in parts or "rejected" in parts:
            raise no_shape
        try:
            detect(parts.row)
        except BadRow:
            raise no_shape from None
        raise BadRow(
            "is a conversation, not a preference pair: it has no chosen and rejected answers, and no label "
            f"({', '.join(LABELS[:2])}) that is true or false. plmtune run sft data=conversations takes such rows"
        )
    opening = parts.opening()
    prompt, chosen, rejected = _READERS[found](parts)
    prompt = [message.as_prompt() for message in joined(opening, prompt)]
    answers: dict[Side, Message | None] = {"chosen": chosen, "rejected": rejected}
    for name, answer in answers.items():
        if answer is not None and not answer.content.strip() and "tool_calls" not in answer.more:
            raise BadRow(f"has an empty {name} answer")
        if answer is not None and (answer.masked or answer.trained is False):
            raise BadRow(f"has a {name} answer of which something is not to be learned (weight, train)")
    for number, message in enumerate(prompt, 1):
        if not message.content.strip() and message.role != "tool" and "tool_calls" not in message.more:
            raise BadRow(f"is empty in turn {number} ({message.role}) of its prompt")
    if not prompt or prompt[-1].role not in ("user", "tool"):
        raise BadRow("has a prompt that does not end in a user's message, or a tool's")
    said = [None if answer is None else (answer.content.strip(), answer.more) for answer in answers.values()]
    if said[0] is not None and said[0] == said[1]:
        raise BadRow("has a chosen answer that equals the rejected one")
    better, worse = (None if answer is None else answer.content for answer in answers.values())
    more = {name: answer.more for name, answer in answers.items() if answer is not None and answer.more}
    return Pair(tuple(prompt), better, worse, place, parts.extra(), more, parts.unused())


_Read = tuple[list[Message], Message | None, Message | None]


def _unfolded(parts: Parts) -> Parts:
    """Rename the keys of OpenAI's pairs: input with messages and tools, preferred_output, non_preferred_output."""
    if "preferred_output" not in parts or "non_preferred_output" not in parts:
        return parts
    row = dict(parts.row)
    given = row.pop("input", None)
    given = {"messages": given} if isinstance(given, list) else given
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise BadRow("has preferred_output, but no messages under input")
    names = {"messages": "prompt", "preferred_output": "chosen", "non_preferred_output": "rejected"}
    outer, inner = ({names.get(key, key): held[key] for key in held} for held in (row, Parts(given).row))
    if twice := outer.keys() & inner.keys():
        raise BadRow(f"has {', '.join(sorted(twice))} twice, in input and beside it")
    return Parts(outer | inner)


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row is a pair, or an answer with a label, by its keys."""
    try:
        parts = _unfolded(Parts(dict(row)))
    except BadRow:
        return False
    return parts.label() is not None if _shape_of(parts) == "unpaired" else "chosen" in parts and "rejected" in parts


def _shape_of(parts: Parts) -> str | None:
    """Detect the shape of a row from its keys and their types; None: it is no pair."""
    if "chosen" in parts and "rejected" in parts:
        chosen, given = parts.row["chosen"], parts.row.get("prompt")
        if not isinstance(chosen, str):
            return "sharegpt" if isinstance(chosen, dict) else "messages" if isinstance(chosen, list) else None
        # After a plain prompt an answer may begin like this, too; with an Assistant: turn it is a whole dialogue.
        if _is_dialogue(given) or (_is_dialogue(chosen) and (given is None or "\n\nAssistant:" in chosen)):
            return "dialogue"
        return "strings" if parts.first(PROMPTS) else None
    answered = parts.first(MESSAGES) or (parts.first(PROMPTS) and parts.first(COMPLETIONS))
    return "unpaired" if answered and parts.first(LABELS) else None


def _is_dialogue(text: Any) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def _read_strings(parts: Parts) -> _Read:
    return parts.question(parts.first(PROMPTS) or "prompt"), _text(parts, "chosen"), _text(parts, "rejected")


def _read_messages(parts: Parts) -> _Read:
    sides = [parts.messages("chosen"), parts.messages("rejected")]
    prompts = [[message.as_prompt() for message in side[:-1]] for side in sides]
    if prompts[0] != prompts[1]:
        raise BadRow("has chosen and rejected conversations that differ before their last message")
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if side[-1].role != "assistant":
            raise BadRow(f"has a {name} conversation that ends in a message of the {side[-1].role}")
    prompt = prompts[0]
    given = parts.row.get("prompt")
    if not prompt or prompt[0].role in ("assistant", "tool"):
        prompt = [*parts.question(parts.first((*PROMPTS, *MESSAGES)) or "prompt"), *prompt]
    elif isinstance(given, list) and given:
        said = [message.as_prompt() for message in parts.messages("prompt")]
        if said[-len(prompt) :] == prompt:
            prompt = said
        elif said not in (prompt[: len(said)], prompt[-len(said) :]):
            prompt = [*said, *prompt]
    elif isinstance(given, str) and any(message.content.strip() == given.strip() for message in prompt):
        parts.used.add("prompt")  # a text beside whole conversations repeats their first question
    return prompt, sides[0][-1], sides[1][-1]


def _read_sharegpt(parts: Parts) -> _Read:
    prompt = parts.question(parts.first((*MESSAGES, *PROMPTS)) or "prompt")
    return prompt, _answer(parts, "chosen"), _answer(parts, "rejected")


def _read_dialogue(parts: Parts) -> _Read:
    given = _text(parts, "prompt").content if "prompt" in parts else ""
    whole = _is_dialogue(parts.row.get("chosen"))  # then a prompt beside it repeats its first question or its beginning
    opening = "" if whole else given
    sides = []
    for name in ("chosen", "rejected"):
        before, *turns = _TURN.split("\n\n" + (opening + _text(parts, name).content).lstrip())
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
    known = (message.content for message in sides[0])
    if whole and given.strip() not in known and not parts.row["chosen"].lstrip().startswith(given.strip()):
        parts.used.discard("prompt")  # it is another text, and is counted as unused
    return sides[0], answers[0], answers[1]


def _read_unpaired(parts: Parts) -> _Read:
    key = parts.first(LABELS) or "label"
    if (label := parts.label()) is None:
        raise BadRow(f"holds {parts.take(key)!r:.40} under {key}, not true or false")
    asked, answered, listed = parts.first(PROMPTS), parts.first(COMPLETIONS), parts.first(MESSAGES)
    if listed and (not asked or not answered or asked == answered):
        *prompt, answer = parts.messages(listed)
        if answer.role != "assistant":
            raise BadRow(f"has {listed} that end in one of the {answer.role}")
    else:
        prompt, answer = parts.question(asked or "prompt"), _answer(parts, answered or "completion")
    return prompt, answer if label else None, None if label else answer


_READERS = {"strings": _read_strings, "messages": _read_messages, "sharegpt": _read_sharegpt,
            "dialogue": _read_dialogue, "unpaired": _read_unpaired}  # fmt: skip


def _text(parts: Parts, key: str) -> Message:
    return Message("assistant", text_of({key: parts.take(key)}, key))


def _answer(parts: Parts, key: str) -> Message:
    """Read an answer that is a text, one message, or a list of one message."""
    if isinstance(parts.row.get(key), str):
        return _text(parts, key)
    value = parts.take(key)
    messages = messages_of([value] if isinstance(value, dict) else value)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise BadRow(f"holds {', '.join(m.role for m in messages)} under {key}, not one message of the assistant")
    return messages[0]


@dataclass(frozen=True)
class Prompt:
    """A prompt of a round: messages, the last of the user, and a reference answer where the data has one."""

    messages: tuple[Message, ...]
    gold: str | None
    place: str
    extra: dict[str, Any] = field(default_factory=dict)


class Preferences(Dataset):
    """A source of pairs."""

    refused: Refused  # rows that the latest reading could not use

    @abstractmethod
    def pairs(self, skip_bad: bool = False) -> Iterator[Pair]:
        """Read the pairs; bad rows are collected in `refused`, and without `skip_bad` raised at the end."""


@dataclass(eq=False)
class PreferenceRows(FromRows, Preferences):
    name = "preferences"

    shape: str

    def pairs(self, skip_bad: bool = False) -> Iterator[Pair]:
        return self._read(lambda row, place: pair_of(row, place, self.shape), skip_bad)

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.rows.fingerprint()} {self.shape}".encode())


class InMemory(Preferences):
    """Pairs in memory."""

    def __init__(self, pairs: Iterable[Pair], name: str) -> None:
        self.name, self.refused = name, Refused()
        self._pairs = list(pairs)

    def pairs(self, skip_bad: bool = False) -> Iterator[Pair]:
        yield from self._pairs

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for pair in self._pairs:
            messages = [(message.role, message.content, *message.more.items()) for message in pair.prompt]
            digest.update(json.dumps([messages, pair.chosen, pair.rejected, *pair.more.items()]).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        return f"{len(self._pairs):,} pairs of {self.name}"


@register("data", "preferences")
def preferences(
    paths: tuple[str, ...] = (),
    *,
    hub: str | None = None,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    shape: Literal["auto", "strings", "messages", "sharegpt", "dialogue", "unpaired"] = "auto",
    encoding: str = "utf-8",
    max_rows: int | None = None,
) -> Preferences:
    """Read preference pairs from JSON, JSON lines, CSV, TSV, Parquet or the hub.

    Args:
        paths, hub, subset, split, revision, encoding, max_rows: as for conversations.
        shape: auto detects it row by row. strings: prompt (or question, instruction, input, query), chosen, rejected.
            messages: chosen and rejected are lists of role and content, whole conversations or what follows a prompt;
            OpenAI's input, preferred_output and non_preferred_output are read as these. sharegpt: conversations, then
            chosen and rejected as one message each (LLaMA-Factory). dialogue: texts with Human: and Assistant:
            (Anthropic's HH). unpaired: prompt and completion (or response, answer, output), or messages, and a label
            (or kto_tag), true for good ones (KTO). Each may have system, tools, history, input and context.
    """
    return PreferenceRows(
        Rows(paths, hub=hub, subset=subset, split=split, revision=revision, encoding=encoding, max_rows=max_rows), shape
    )


@register("data", "docstring_pairs")
def docstring_pairs() -> Preferences:
    """Make pairs of the standard library: a function's own docstring is preferred to that of another one.

    The other has about the same length, so that length does not give it away. The pairs can be checked, and are part
    of every Python.
    """
    functions = sorted(public_functions(), key=lambda f: (len(f.doc), f.module, f.name))
    made = []
    for index, function in enumerate(functions):
        near = [f.doc for f in functions[max(0, index - 8) : index + 9] if f.doc != function.doc]
        if near:
            other = near[xxhash.xxh3_64_intdigest(function.where.encode()) % len(near)]
            asked = (Message("user", function.question),)
            made.append(Pair(asked, function.doc, other, f"docstring of {function.where}"))
    return InMemory(sorted(made, key=lambda pair: pair.place), "docstring_pairs")


def prompts_of(sources: Iterable[Conversations | Preferences]) -> list[Prompt]:
    """Return the distinct prompts of conversations or pairs, each with its reference answer, if any.

    The prompt of a conversation is everything before its last answer, which is the reference; for pairs it is the
    first chosen answer.
    """
    found: dict[tuple[Message, ...], Prompt] = {}
    for prompt in chain.from_iterable(map(_prompts, sources)):
        if found.setdefault(prompt.messages, prompt).gold is None:
            found[prompt.messages] = prompt
    return list(found.values())


def _prompts(data: Conversations | Preferences) -> Iterator[Prompt]:
    if isinstance(data, Preferences):
        for pair in data.pairs(skip_bad=True):
            yield Prompt(pair.prompt, pair.chosen or None, pair.place, pair.extra)
    else:
        for held in data.conversations(skip_bad=True):
            *before, last = (message.as_prompt() for message in held.messages)
            answered = last.role == "assistant"  # else it ends in a question
            messages = tuple(before) if answered else (*before, last)
            yield Prompt(messages, last.content or None if answered else None, held.place, held.extra)
