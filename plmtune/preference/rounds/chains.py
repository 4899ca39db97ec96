"""Chains of answers: for each prompt a first answer, then answers that refine the one before.

A round that is killed goes on where it was. Each answer is a line of a journal as soon as it is there, and what a
prompt's turn says depends on (seed, round, prompt, turn) alone: so no answer is written twice, none is lost, and the
round ends with the same chains as one that nobody killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from plmtune.data.order import key_of
from plmtune.data.preferences import Prompt
from plmtune.errors import UserError, unreadable
from plmtune.inference.batching import Answer, Request
from plmtune.inference.sampling import before_stop, encode_stops
from plmtune.io import checksummed_json
from plmtune.io.atomic import atomic_write
from plmtune.io.untrusted import load_json
from plmtune.preference.refinement import Refinement
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Message
from plmtune.training import distributed

T = TypeVar("T")

PROMPTS, CHAINS, SETTINGS = "prompts.jsonl", "chains.jsonl", "settings.json"

RHYTHM = 1.0  # seconds between two looks at whether other processes still write, or someone asks to stop


@dataclass(frozen=True)
class Turn:
    """One answer. `ended`: the model or a stop string ended it, instead of running out of tokens."""

    text: str
    ended: bool
    reward: float | None = None


@dataclass(frozen=True)
class Chain:
    """A prompt with its answers, of which each refines the one before.

    Attributes:
        prompt: ends in a user's message.
        place: where the prompt stands, for a person.
        extra: what else its row held, for example tests.
        gold: the answer that its data gives.
        short: why there are fewer answers than turns, worded as for `Refused`.
    """

    prompt: tuple[Message, ...]
    answers: tuple[Turn, ...]
    place: str
    extra: dict[str, Any] = field(default_factory=dict)
    gold: str | None = None
    short: str | None = None


class RolloutEngine(Protocol):
    """Of `plmtune.inference.batching.BatchedGenerator` what a round needs."""

    def submit(self, request: Request) -> None: ...

    def run(self) -> Iterator[Answer]: ...


def write_prompts(directory: Path, prompts: Iterable[Prompt]) -> None:
    """Keep the prompts of a round as JSONL that a person can read."""
    directory.mkdir(parents=True, exist_ok=True)
    _save(directory / PROMPTS, prompts)


def read_prompts(directory: Path) -> list[Prompt]:
    """Read what `write_prompts` kept.

    Raises:
        UserError: naming file and row of a line that is no prompt.
    """

    def prompt(messages: list[dict[str, Any]], gold: str | None = None, **rest: Any) -> Prompt:
        return Prompt(_said(messages), gold, **rest)

    return _read(directory / PROMPTS, prompt)


def save_chains(path: Path, chains: Iterable[Chain]) -> None:
    """Keep chains as JSONL that a person can read."""
    _save(path, chains)


def read_chains(path: Path) -> list[Chain]:
    """Read what `save_chains` kept.

    Raises:
        UserError: naming file and row of a line that is no chain.
    """

    def chain(prompt: list[dict[str, Any]], answers: list[dict[str, Any]], **rest: Any) -> Chain:
        return Chain(_said(prompt), tuple(Turn(**answer) for answer in answers), **rest)

    return _read(path, chain)


def _said(messages: list[dict[str, Any]]) -> tuple[Message, ...]:
    return tuple(map(Message.from_row, messages))


def _save(path: Path, items: Iterable[Prompt] | Iterable[Chain]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in items:
            row = {name: value for name, value in asdict(item).items() if value is not None}
            said = "messages" if isinstance(item, Prompt) else "prompt"
            row[said] = [message.to_row() for message in getattr(item, said)]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read(path: Path, make: Callable[..., T]) -> list[T]:
    """Make something of each line's object.

    Raises:
        UserError: naming file and row of a line that nothing can be made of.
    """
    made = []
    # Not splitlines: U+2028 and others of its kind may stand in a text.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            made.append(make(**load_json(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}, row {number}: damaged ({error}). Remove the file to have it made again."
            ) from error
    return made


def write_chains(
    directory: Path,
    prompts: Sequence[Prompt],
    engine: RolloutEngine,
    template: ChatTemplate,
    refinement: Refinement,
    *,
    turns: int,
    mode: Literal["chain", "samples"],
    max_new_tokens: int,
    max_len: int,
    seed: int,
    number: int,
    model: str,
    until: Sequence[str] = (),
    progress: Callable[[int, int, float], None] = lambda done, total, tokens_per_second: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Chain] | None:
    """Let the model answer every prompt in turns, and keep the chains as ``chains.jsonl`` in `directory`.

    What they were written under is kept beside them, in ``settings.json``. Every process calls it with the same prompts
    and answers its share of them.

    Args:
        directory: of this round, the same for all processes; what a killed call left there is gone on from.
        engine: writes the answers; empty.
        turns: answers a prompt.
        mode: "chain": each answer refines the one before; "samples": all are answers to the prompt itself.
        max_len: longest prompt together with its answer, in tokens.
        number: of the round; with `seed` it decides what is drawn.
        model: digest of the weights; answers of others are not gone on from.
        until: an answer ends before the first of these texts.
        progress: called after each answer with (answers that are there, answers of this process, tokens a second).
        stop: asked about once a second, on every process at the same times, whether to leave off.

    Returns:
        The chains in the order of the prompts, or None after `stop`.

    Raises:
        ValueError: for impossible numbers.
        UserError: if the directory's answers were written under other settings.
    """
    if turns < 1 or max_new_tokens < 1:
        raise ValueError(f"turns and max_new_tokens must be at least 1, but are {turns} and {max_new_tokens}")
    if max_new_tokens >= max_len:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) leaves no room for a prompt in {max_len} tokens")
    settings = {
        "model": model,
        "template": template.fingerprint,
        "refinement": refinement.source,
        "prompts": f"{key_of(*(prompt.messages for prompt in prompts)):016x}",
        "turns": turns,
        "strategy": mode,  # named so in the settings of earlier versions
        "max_new_tokens": max_new_tokens,
        "max_len": max_len,
        "seed": seed,
        "number": number,
    }
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory, settings)
    plan = _Plan(prompts, template, refinement, turns, mode, max_new_tokens, max_len, (seed, number), until)
    if not distributed.broadcast_from_rank0(journal.is_whole):
        if not _write(plan, journal, engine, progress, stop):
            return None
        if distributed.rank() == 0:
            answers = journal.read()
            journal.keep_settings()
            save_chains(directory / CHAINS, (plan.chain(index, answers) for index in range(len(prompts))))
            journal.remove()
        distributed.barrier()
    return read_chains(directory / CHAINS)


Answers = dict[tuple[int, int], Turn]  # (prompt, turn) -> what was said


class Journal:
    """The answers of a round that is not whole yet: one file of JSONL a process, one line an answer."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory, self.settings = directory, settings
        self.path = directory / f"answers-{distributed.rank():05d}.jsonl"

    def read(self) -> Answers:
        """All answers, also those that more or fewer processes wrote.

        Raises:
            UserError: if they were written under other settings, or a line of a file's middle is damaged.
        """
        answers: Answers = {}
        for path in self._files():
            # What follows the last line break is a line that a kill tore.
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
                try:
                    row = load_json(line)
                    if number == 1:
                        self._check(path, row["settings"])
                    else:
                        answers[row["prompt"], row["turn"]] = Turn(row["text"], row["ended"])
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(
                        f"{path}, row {number}: damaged ({error!r}). Remove this row, and its answer is written again."
                    ) from error
        return answers

    def is_whole(self) -> bool:
        """Whether the chains are there already.

        Raises:
            UserError: if they were written under other settings, or nothing whole says under which.
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
                f"{path}, which says how {CHAINS} was written, cannot be read: {error}. "
                f"Remove {self.directory} to write the answers again."
            ) from error
        self._check(self.directory / CHAINS, other)
        return True

    def keep_settings(self) -> None:
        checksummed_json.save(self.directory / SETTINGS, self.settings)

    def open(self) -> None:
        """Make this process' file ready for `add`: a torn line goes."""
        self.file = self.path.open("ab")
        whole = self.path.read_bytes().rfind(b"\n") + 1
        self.file.truncate(whole)
        if not whole:
            self._write({"settings": self.settings})

    def add(self, prompt: int, turn: int, answer: Turn) -> None:
        self._write({"prompt": prompt, "turn": turn, "text": answer.text, "ended": answer.ended})

    def remove(self) -> None:
        """Once the chains are kept as a whole."""
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
                f"{self.settings[name]!r}. Remove {self.directory} to write them again."
            )


class _Plan:
    """What is asked for each (prompt, turn): a pure function of the answers before."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        template: ChatTemplate,
        refinement: Refinement,
        turns: int,
        mode: str,
        max_new_tokens: int,
        max_len: int,
        seeds: tuple[int, int],
        until: Sequence[str],
    ) -> None:
        self.until, self._stops = tuple(until), encode_stops(until)
        self.prompts, self.template, self.refinement = prompts, template, refinement
        self.turns, self.chained, self.max_new_tokens, self.seeds = turns, mode == "chain", max_new_tokens, seeds
        self.room = max_len - max_new_tokens

    def due(self, index: int, answers: Answers, after: int = -1) -> list[tuple[int, Request | str]]:
        """(turn, request or why there can be none) of what can be asked once turn `after` is there; -1: all."""
        missing = [turn for turn in range(self.turns) if (index, turn) not in answers]
        if self.chained:
            missing = missing[:1]  # the others wait for it
        elif after >= 0:
            missing = []  # all were asked for at once
        return [(turn, self._request(index, turn, answers)) for turn in missing]

    def _request(self, index: int, turn: int, answers: Answers) -> Request | str:
        prompt = self.prompts[index].messages
        try:
            if turn == 0 or not self.chained:
                ids = self.template.encode_prompt(prompt)
            else:
                earlier = answers[index, turn - 1].text
                found = self.refinement.encode(self.template, prompt, earlier, max_len=self.room)
                if found is None:
                    return f"leaves no room in {self.room:,} tokens for an answer to refine"
                ids = found[0]
        except BadRow as error:
            return str(error)
        if len(ids) > self.room:
            return f"has a prompt of more than {self.room:,} tokens"
        seed = key_of(*self.seeds, index, turn) >> 1  # torch's generators take 63 bits
        return Request(f"{index}/{turn}", ids.tolist(), self.max_new_tokens, seed, self._stops)

    def chain(self, index: int, answers: Answers) -> Chain:
        """The prompt with its answers, once no more can be had."""
        given = [turn for turn in range(self.turns) if (index, turn) in answers]
        reasons = [reason for _, reason in self.due(index, answers) if isinstance(reason, str)]
        prompt = self.prompts[index]
        said = tuple(answers[index, turn] for turn in given)
        short = reasons[0] if reasons else None
        return Chain(prompt.messages, said, prompt.place, prompt.extra, prompt.gold, short)


def _write(
    plan: _Plan,
    journal: Journal,
    engine: RolloutEngine,
    progress: Callable[[int, int, float], None],
    stop: Callable[[], bool],
) -> bool:
    """Write what this process' journal lacks; whether all processes have come to the end."""
    answers = journal.read()
    mine = range(distributed.rank(), len(plan.prompts), distributed.world_size())
    done = sum((index, turn) in answers for index in mine for turn in range(plan.turns))
    distributed.barrier()  # a file that another process already writes to again would be read torn
    journal.open()

    def ask(index: int, after: int = -1) -> None:
        for _, request in plan.due(index, answers, after):
            if isinstance(request, Request):
                engine.submit(request)

    for index in mine:
        ask(index)
    begun = looked = time.monotonic()
    tokens = 0
    for answer in engine.run():
        index, turn = map(int, answer.key.split("/"))
        text = before_stop(plan.template.tokenizer.decode(answer.tokens), plan.until)
        answers[index, turn] = Turn(text, answer.ended or answer.stopped)
        journal.add(index, turn, answers[index, turn])
        ask(index, after=turn)
        now = time.monotonic()
        done, tokens = done + 1, tokens + len(answer.tokens)
        progress(done, len(mine) * plan.turns, tokens / max(now - begun, 1e-9))
        if now - looked >= RHYTHM:
            looked = now
            distributed.any_rank(True)
            if distributed.any_rank(stop()):
                return False
    while distributed.any_rank(False):
        if distributed.any_rank(stop()):
            return False
    return True
