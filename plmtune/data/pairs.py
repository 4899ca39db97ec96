"""Preference pairs, read from rows of every usual shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from plmtune.data.conversations import detect
from plmtune.data.messages import messages_of
from plmtune.data.parts import COMPLETIONS, LABELS, MESSAGES, PROMPTS, Parts, joined
from plmtune.data.sources import text_of
from plmtune.tokenizers.message import SAID, BadRow, Message

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers.

    prompt: messages, the last of the user or of a tool.
    chosen, rejected: the better and the worse answer; one of them is None where a row held only one with a label.
    place: "FILE, line 17".
    extra: the other columns of its row, as far as they are JSON.
    more: further keys of the answers, as `Message.more`: calls, thoughts, ...
    unused: the columns that nothing reads.
    """

    prompt: tuple[Message, ...]
    chosen: str | None
    rejected: str | None
    place: str
    extra: dict[str, Any] = field(default_factory=dict)
    more: dict[Side, dict[str, Any]] = field(default_factory=dict)
    unused: tuple[str, ...] = field(default=(), compare=False)

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
    """Read one row.

    Raises:
        BadRow: if it fits no shape or not the one that is named, lacks an answer, has two equal ones, or a prompt
            which does not end in a message of the user or a tool.
    """
    parts = _unfolded(Parts(dict(row)))
    found = _shape_of(parts) if shape == "auto" else shape
    if found is None and _is_conversation(parts):
        raise BadRow(
            "is a conversation, not a preference pair: it has no chosen and rejected answers, and no label "
            f"({', '.join(LABELS[:2])}) that is true or false. plmtune run sft data=conversations takes such rows"
        )
    if found is None:
        keys = ", ".join(map(str, parts.row)) or "none"
        raise BadRow(f"has the keys {keys:.200}, which fit no shape of preferences ({_SHAPES})")
    opening = parts.opening()
    try:
        prompt, chosen, rejected = _READERS[found](parts)
    except KeyError as error:
        raise BadRow(f"has no key {error.args[0]}, which the shape {found} needs") from error
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
    texts = [None if answer is None else answer.content for answer in answers.values()]
    more = {name: answer.more for name, answer in answers.items() if answer is not None and answer.more}
    return Pair(tuple(prompt), texts[0], texts[1], place, parts.extra(), more, parts.unused())


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
    found = _shape_of(parts)
    return "chosen" in parts and "rejected" in parts if found != "unpaired" else parts.label() is not None


def _shape_of(parts: Parts) -> str | None:
    """Detect the shape of a row from its keys and their types; None: it is no pair."""
    if "chosen" in parts and "rejected" in parts:
        chosen = parts.row["chosen"]
        if isinstance(chosen, dict):
            return "sharegpt"
        if isinstance(chosen, list):
            return "messages"
        if isinstance(chosen, str):
            given = parts.row.get("prompt")
            # After a plain prompt an answer may begin like this, too; with an Assistant: turn it is a whole dialogue.
            if _is_dialogue(given) or (_is_dialogue(chosen) and (given is None or "\n\nAssistant:" in chosen)):
                return "dialogue"
            return "strings" if parts.first(PROMPTS) else None
        return None
    answered = parts.first(MESSAGES) or (parts.first(PROMPTS) and parts.first(COMPLETIONS))
    return "unpaired" if answered and parts.first(LABELS) else None


def _is_dialogue(text: Any) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def _is_conversation(parts: Parts) -> bool:
    try:
        detect(parts.row)
    except BadRow:
        return False
    return "chosen" not in parts and "rejected" not in parts


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
        key = parts.first((*PROMPTS, *MESSAGES)) or "prompt"
        prompt = [*(parts.question(key) if key in parts else _missing("prompt")), *prompt]
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
    key = parts.first((*MESSAGES, *PROMPTS)) or "prompt"
    prompt = parts.question(key) if key in parts else _missing("prompt")
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
    key = parts.first(LABELS) or _missing("label")
    label = parts.label()
    if label is None:
        raise BadRow(f"holds {parts.row[key]!r:.40} under {key}, not true or false")
    prompt_key, answer_key = parts.first(PROMPTS), parts.first(COMPLETIONS)
    listed = parts.first(MESSAGES)
    if prompt_key and answer_key and prompt_key != answer_key:
        prompt, answer = parts.question(prompt_key), _answer(parts, answer_key)
    elif listed:
        *prompt, answer = parts.messages(listed)
        if answer.role != "assistant":
            raise BadRow(f"has {listed} that end in one of the {answer.role}")
    else:
        _missing("completion" if prompt_key else "prompt")
    return prompt, answer if label else None, None if label else answer


_READERS = {"strings": _read_strings, "messages": _read_messages, "sharegpt": _read_sharegpt,
            "dialogue": _read_dialogue, "unpaired": _read_unpaired}  # fmt: skip


def _missing(key: str) -> Any:
    raise KeyError(key)


def _text(parts: Parts, key: str) -> Message:
    if key not in parts:
        _missing(key)
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
