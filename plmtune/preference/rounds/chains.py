"""Chains of answers, and their files: for each prompt a first answer, then answers that refine the one before.

A round in progress has a journal: one JSONL file a process, one line an answer, so that no kill loses any.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from plmtune.data.preferences import Prompt
from plmtune.errors import UserError, unreadable
from plmtune.io import checksummed_json
from plmtune.io.atomic import atomic_write
from plmtune.io.untrusted import load_json
from plmtune.tokenizers.message import Message
from plmtune.training import distributed

PROMPTS, CHAINS, SETTINGS = "prompts.jsonl", "chains.jsonl", "settings.json"


@dataclass(frozen=True)
class Turn:
    """One answer."""

    text: str
    ended: bool  # by the model or a stop string, not by max_new_tokens
    reward: float | None = None


@dataclass(frozen=True)
class Chain:
    """A prompt with its answers, each of which refines the one before."""

    prompt: tuple[Message, ...]  # ends in a user's message
    answers: tuple[Turn, ...]
    place: str  # of the prompt
    extra: dict[str, Any] = field(default_factory=dict)  # the other columns of its row, for example tests
    gold: str | None = None  # the answer of its data
    short: str | None = None  # why there are fewer answers than turns, worded as for `Refused`


def save_prompts(directory: Path, prompts: Iterable[Prompt]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_rows(directory / PROMPTS, (_row(prompt, "messages") for prompt in prompts))


def save_chains(path: Path, chains: Iterable[Chain]) -> None:
    save_rows(path, (_row(chain, "prompt") for chain in chains))


def _row(item: Prompt | Chain, messages: str) -> dict[str, Any]:
    said = [message.to_row() for message in getattr(item, messages)]
    return {name: value for name, value in asdict(item).items() if value is not None} | {messages: said}


def save_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write readable JSONL."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_chains(path: Path) -> list[Chain]:
    """Read what `save_chains` wrote."""

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


Answers = dict[tuple[int, int], Turn]  # (number of the prompt, turn) -> answer


class Journal:
    """The answers of a round until its chains are complete; UserError if those that are there have other `settings`."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory, self.settings = directory, settings
        self.path = directory / f"answers-{distributed.rank():05d}.jsonl"

    def read(self) -> Answers:
        """All answers, also those of more or fewer processes."""
        answers: Answers = {}
        for path in self._files():
            # A kill may have cut the line after the last line break.
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
                try:
                    row = load_json(line)
                    if number == 1:
                        self._check(path, row["settings"])
                    else:
                        answers[row["prompt"], row["turn"]] = Turn(row["text"], row["ended"])
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(
                        f"{path}, row {number}: damaged ({error!r}). Remove this row; its answer is generated again."
                    ) from error
        return answers

    def is_complete(self) -> bool:
        """Whether the chains are complete."""
        if not (self.directory / CHAINS).is_file():
            return False
        path = self.directory / SETTINGS
        try:
            other = checksummed_json.load(path)
        except PermissionError as error:
            raise unreadable(path, error) from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}, the settings of {CHAINS}, cannot be read: {error}. "
                f"Remove {self.directory} to generate the answers again."
            ) from error
        self._check(self.directory / CHAINS, other)
        return True

    def finish(self, chains: Iterable[Chain]) -> None:
        """Save the chains; remove the files of all processes."""
        checksummed_json.save(self.directory / SETTINGS, self.settings)
        save_chains(self.directory / CHAINS, chains)
        for path in self._files():
            path.unlink()

    def open(self) -> None:
        """Prepare this process's file for `add`: remove a line that a kill cut."""
        self.file = self.path.open("ab")
        whole = self.path.read_bytes().rfind(b"\n") + 1
        self.file.truncate(whole)
        if not whole:
            self._write({"settings": self.settings})

    def add(self, prompt: int, turn: int, answer: Turn) -> None:
        self._write({"prompt": prompt, "turn": turn, "text": answer.text, "ended": answer.ended})

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("answers-*.jsonl"))

    def _check(self, path: Path, other: dict[str, Any]) -> None:
        for name, value in self.settings.items():
            if other.get(name) != value:
                raise UserError(
                    f"{path} holds answers of another round: its {name} is {other.get(name)!r}, not {value!r}. "
                    f"Remove {self.directory} to generate them again."
                )
