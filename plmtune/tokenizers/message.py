"""A message of a conversation, and what becomes of rows that hold one: bad ones, and columns that nothing reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from plmtune.units import show_number_of

# Keys of a message in which somebody says something: a template that leaves them out is refused.
THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")
SAID = ("tool_calls", *THOUGHTS, "tool_plan", "refusal", "train_detail", "training_detail")
_MOST_UNUSED = 40


@dataclass(frozen=True, repr=False)
class Message:
    """One turn of a conversation.

    role: system, user, assistant, tool (what a call gave back); tools for what the assistant may call, which can only
        be the first: their definitions as JSON.
    content: its text; empty where an assistant does nothing but call tools.
    more: further keys that the chat template gets, as JSON: tool_calls, reasoning_content, name, ...
    trained: whether its row says that it is learned; None: the row does not say.
    masked: parts [begin, end) of a content, in characters, of which the row says that they are not learned.
    """

    role: str
    content: str
    more: dict[str, Any] = field(default_factory=dict, hash=False)
    trained: bool | None = None
    masked: tuple[tuple[int, int], ...] = ()

    def __repr__(self) -> str:  # of a plain turn as it ever was: hashes of prompts are made of it
        rest = {"more": self.more, "trained": self.trained, "masked": self.masked}
        said = [f"{name}={value!r}" for name, value in rest.items() if value or value is False]
        return f"Message({', '.join([f'role={self.role!r}', f'content={self.content!r}', *said])})"

    def as_prompt(self) -> Message:
        """The message as a part of a prompt, of which nothing is learned."""
        return self if self.trained is None and not self.masked else Message(self.role, self.content, self.more)

    def to_row(self) -> dict[str, Any]:
        """What a file of prompts holds of it; `Message.from_row` reads it."""
        return {"role": self.role, "content": self.content, **self.more}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Message:
        """Read what `to_row` gives.

        Raises:
            TypeError: without role and content as text.
        """
        role, content = row.get("role"), row.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise TypeError("a message has no role and content")
        return cls(role, content, {key: value for key, value in row.items() if key not in ("role", "content")})


class BadRow(ValueError):
    """A row without usable text; the reader adds where it stands."""


@dataclass
class Unused:
    """What rows hold and nothing reads: how many rows, by name."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, names: Iterable[str], rows: int = 1) -> None:
        """Count rows that have these."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + rows

    def merge(self, other: Unused) -> None:
        """Add the counts of another."""
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def __len__(self) -> int:
        return len(self.counts)

    def describe(self) -> str:
        """Return one line, the most frequent first: "columns not used: id (1,000 rows), lang (3 rows)"."""
        names = sorted(self.counts, key=lambda name: (-self.counts[name], name))
        shown = [f"{name:.60} ({show_number_of(self.counts[name], 'row')})" for name in names]
        rest = f", and {len(shown) - _MOST_UNUSED:,} more" if len(shown) > _MOST_UNUSED else ""
        return f"columns not used: {', '.join(shown[:_MOST_UNUSED])}{rest}"


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
