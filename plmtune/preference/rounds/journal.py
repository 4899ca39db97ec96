"""The journal of a round in progress: one JSONL file a process, one line an answer, so that no kill loses any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plmtune.errors import UserError, unreadable
from plmtune.io import checksummed_json
from plmtune.io.untrusted import load_json
from plmtune.preference.rounds.chains import CHAINS, Turn
from plmtune.training import distributed

SETTINGS = "settings.json"

Answers = dict[tuple[int, int], Turn]  # (number of the prompt, turn) -> answer


class Journal:
    """The answers of a round until its chains are complete.

    Args:
        directory: of the round, the same for all processes.
        settings: that the answers are generated with; answers of others are refused.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory, self.settings = directory, settings
        self.path = directory / f"answers-{distributed.rank():05d}.jsonl"

    def read(self) -> Answers:
        """All answers, also those of more or fewer processes.

        Raises:
            UserError: if they have other settings, or a line that is not the last one of its file is damaged.
        """
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
        """Whether the chains are complete.

        Raises:
            UserError: if they have other settings, or their settings cannot be read.
        """
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

    def save_settings(self) -> None:
        checksummed_json.save(self.directory / SETTINGS, self.settings)

    def open(self) -> None:
        """Prepare this process's file for `add`: remove a line that a kill cut."""
        self.file = self.path.open("ab")
        whole = self.path.read_bytes().rfind(b"\n") + 1
        self.file.truncate(whole)
        if not whole:
            self._write({"settings": self.settings})

    def add(self, prompt: int, turn: int, answer: Turn) -> None:
        self._write({"prompt": prompt, "turn": turn, "text": answer.text, "ended": answer.ended})

    def remove(self) -> None:
        """Remove the files of all processes, once the chains are saved."""
        for path in self._files():
            path.unlink()

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("answers-*.jsonl"))

    def _check(self, path: Path, other: dict[str, Any]) -> None:
        differ = [name for name, value in self.settings.items() if other.get(name) != value]
        if differ:
            name = differ[0]
            raise UserError(
                f"{path} holds answers of another round: its {name} is {other.get(name)!r}, not "
                f"{self.settings[name]!r}. Remove {self.directory} to generate them again."
            )
