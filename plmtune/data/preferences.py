"""Preference pairs: a prompt, the answer that is preferred and one that is not."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

from plmtune.data.conversations import Conversations
from plmtune.data.functions import public_functions, question
from plmtune.data.pairs import Pair, pair_of
from plmtune.data.rows import FromRows, Refused, Rows
from plmtune.data.sources import Dataset
from plmtune.registry import register
from plmtune.tokenizers.message import Message, Unused


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


class PreferenceRows(FromRows, Preferences):
    name = "preferences"

    def __init__(self, rows: Rows, shape: str) -> None:
        super().__init__(rows)
        self.shape = shape

    def pairs(self, skip_bad: bool = False) -> Iterator[Pair]:
        return self._read(lambda row, place: pair_of(row, place, self.shape), skip_bad)

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.rows.fingerprint()} {self.shape}".encode())


class InMemory(Preferences):
    """Pairs in memory, such as a round's."""

    def __init__(self, pairs: Iterable[Pair], name: str) -> None:
        self.name = name
        self.refused, self.unused = Refused(), Unused()
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

    Raises:
        UserError: for neither or both of paths and hub, or a path that is not there.
        ValueError: for an unknown encoding, or max_rows below 1.
    """
    return PreferenceRows(
        Rows(paths, hub=hub, subset=subset, split=split, revision=revision, encoding=encoding, max_rows=max_rows), shape
    )


@register("data", "docstring_pairs")
def docstring_pairs() -> Preferences:
    """Make pairs of the standard library: a function's own docstring is preferred to that of another one.

    The other has about the same length, so that length does not give it away. The pairs can be checked, and are part
    of every Python.

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
    """Yield the distinct prompts of conversations or pairs, each with its reference answer, if any.

    The prompt of a conversation is everything before its last answer, which is the reference; for pairs it is the
    first chosen answer.
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
            yield Prompt(pair.prompt, pair.chosen or None, pair.place, pair.extra)
    else:
        for held in data.conversations(skip_bad):
            messages = tuple(message.as_prompt() for message in held.messages)
            if messages[-1].role == "assistant":
                yield Prompt(messages[:-1], messages[-1].content or None, held.place, held.extra)
            else:  # a question without an answer
                yield Prompt(messages, None, held.place, held.extra)
