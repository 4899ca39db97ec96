"""Messages of conversations, bad rows, and counts of unused columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from plmtune.units import show_number_of

# Keys of a message that are content: a template that leaves them out is refused.
THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")
SAID = ("tool_calls", *THOUGHTS, "tool_plan", "refusal", "train_detail", "training_detail")
_MOST_UNUSED = 40


@dataclass(frozen=True, repr=False)
class Message:
    """One turn of a conversation.

    role: system, user, assistant, tool (the result of a call); the first message may have the role tools, whose
        content is the definitions of tools as JSON.
    content: its text; empty if an assistant only calls tools.
    more: further keys for the chat template, as JSON: tool_calls, reasoning_content, name, ...
    trained: the row's flag whether to train on it; None: the row has none.
    masked: parts [begin, end) of the content, in characters, that the row excludes from training.
    """

    role: str
    content: str
    more: dict[str, Any] = field(default_factory=dict, hash=False)
    trained: bool | None = None
    masked: tuple[tuple[int, int], ...] = ()

    def __repr__(self) -> str:  # must not change for a plain turn: hashes of prompts use it
        rest = {"more": self.more, "trained": self.trained, "masked": self.masked}
        said = [f"{name}={value!r}" for name, value in rest.items() if value or value is False]
        return f"Message({', '.join([f'role={self.role!r}', f'content={self.content!r}', *said])})"

    def as_prompt(self) -> Message:
        """Return the message as part of a prompt, without flags for training."""
        return self if self.trained is None and not self.masked else Message(self.role, self.content, self.more)

    def to_row(self) -> dict[str, Any]:
        """Return the form in files of prompts, which `from_row` reads."""
        return {"role": self.role, "content": self.content, **self.more}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Message:
        """Read the result of `to_row`; TypeError without role and content as text."""
        role, content = row.get("role"), row.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise TypeError("a message has no role and content")
        return cls(role, content, {key: value for key, value in row.items() if key not in ("role", "content")})


class BadRow(ValueError):
    """A row that cannot be used; the reader adds its place."""


@dataclass
class Unused:
    """Numbers of rows by the columns that nothing reads."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, names: Iterable[str], rows: int = 1) -> None:
        """Count rows with these columns."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + rows

    def merge(self, other: Unused) -> None:
        """Add the counts of another."""
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def __len__(self) -> int:
        return len(self.counts)

    def describe(self) -> str:
        """Return a line such as "columns not used: id (1,000 rows), lang (3 rows)", the most frequent first."""
        names = sorted(self.counts, key=lambda name: (-self.counts[name], name))
        shown = [f"{name:.60} ({show_number_of(self.counts[name], 'row')})" for name in names]
        rest = f", and {len(shown) - _MOST_UNUSED:,} more" if len(shown) > _MOST_UNUSED else ""
        return f"columns not used: {', '.join(shown[:_MOST_UNUSED])}{rest}"


def texts_in(value: Any) -> Iterable[str]:
    """Yield all texts in a JSON value, including names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inside in value.items():
            yield key
            yield from texts_in(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from texts_in(inside)
