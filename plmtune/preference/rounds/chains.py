"""Chains of answers, and their files: for each prompt a first answer, then answers that refine the one before."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from plmtune.data.preferences import Prompt
from plmtune.errors import UserError
from plmtune.io.atomic import atomic_write
from plmtune.io.untrusted import load_json
from plmtune.tokenizers.message import Message

PROMPTS, CHAINS = "prompts.jsonl", "chains.jsonl"


@dataclass(frozen=True)
class Turn:
    """One answer. `ended`: the model or a stop string ended it, not max_new_tokens."""

    text: str
    ended: bool
    reward: float | None = None


@dataclass(frozen=True)
class Chain:
    """A prompt with its answers, each of which refines the one before.

    Attributes:
        prompt: ends in a user's message.
        place: of the prompt, for a person.
        extra: the other columns of its row, for example tests.
        gold: the answer of its data.
        short: why there are fewer answers than turns, worded as for `Refused`.
    """

    prompt: tuple[Message, ...]
    answers: tuple[Turn, ...]
    place: str
    extra: dict[str, Any] = field(default_factory=dict)
    gold: str | None = None
    short: str | None = None


def save_prompts(directory: Path, prompts: Iterable[Prompt]) -> None:
    """Write the prompts of a round as readable JSONL."""
    directory.mkdir(parents=True, exist_ok=True)
    _save(directory / PROMPTS, prompts, "messages")


def save_chains(path: Path, chains: Iterable[Chain]) -> None:
    """Write chains as readable JSONL."""
    _save(path, chains, "prompt")


def _save(path: Path, items: Iterable[Prompt] | Iterable[Chain], messages: str) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in items:
            row = {name: value for name, value in asdict(item).items() if value is not None}
            row[messages] = [message.to_row() for message in getattr(item, messages)]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_chains(path: Path) -> list[Chain]:
    """Read what `save_chains` wrote.

    Raises:
        UserError: naming file and row of a line that is no chain.
    """

    def chain(prompt: list[dict[str, Any]], answers: list[dict[str, Any]], **rest: Any) -> Chain:
        return Chain(tuple(map(Message.from_row, prompt)), tuple(Turn(**answer) for answer in answers), **rest)

    chains = []
    # Not splitlines, which also splits at U+2028 and its like inside a text.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            chains.append(chain(**load_json(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, row {number}: damaged ({error}). Remove the file to make it again.") from error
    return chains
