"""What ``plmtune data inspect FILE`` shows: a conversation, a pair or a chain of answers, and the file in short."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from plmtune.cli.find_tokenizer import find_tokenizer
from plmtune.data.conversations import Conversation, Shape, conversation_of, detect, messages_of
from plmtune.data.preferences import SIDES, is_pair, pair_of
from plmtune.data.rows import Refused, Rows
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.tables import Table, numbers, show
from plmtune.io.terminal import Progress, visible
from plmtune.tokenizers.chat_template import ChatTemplate, TrainOn, find_template
from plmtune.tokenizers.message import BadRow, Message, Unused
from plmtune.units import show_number_of

_TRAINED = "bold green"
_OPEN, _CLOSE = "⟦", "⟧"
_BLOCK = 512

Row = dict[str, Any]
Block = Sequence[tuple[str, Row | BadRow]]
T = TypeVar("T")


def console_of_stdout() -> Console:
    return Console(highlight=False, width=terminal.columns(sys.stdout), soft_wrap=not sys.stdout.isatty())


def inspect_rows(path: Path, *, row: int, tokenizer: str, template: str | None, train_on: TrainOn) -> None:
    """Show one row of a file (from 1) with its tokens, then the file in short."""
    rows = Rows([str(path)])
    kind = kind_of_rows(next((held for _, held in rows if isinstance(held, dict)), {}))
    reader: _Conversations | _Pairs | _Chains
    if kind in ("conversations", "pairs"):
        found = find_template(template, find_tokenizer(tokenizer))
        reader = _Pairs(found) if kind == "pairs" else _Conversations(found, _shape_of(rows), train_on)
        vocabulary = f"{found.where}; {found.tokenizer.num_tokens:,} tokens in the vocabulary"
    else:
        reader, vocabulary = _Chains(), None
    place, asked = next(islice(rows, row - 1, None), (None, None))
    if place is None:
        held = sum(1 for _ in rows)
        raise UserError(f"--row {row}: {path} has {show_number_of(held, 'row')}" if held else f"{path} holds no rows")
    console = console_of_stdout()
    console.print(visible(place), style="bold", markup=False)
    try:
        if isinstance(asked, BadRow):
            raise asked
        assert asked is not None
        reader.show(console, asked, place)
    except BadRow as error:
        console.print(visible(f"cannot be used: it {error}"), markup=False)
    console.print()
    refused, count, remaining = Refused(), 0, iter(rows)
    with Progress() as progress:
        while block := list(islice(remaining, _BLOCK)):
            count += len(block)
            for (at, _), result in zip(block, reader.count(block), strict=True):
                if isinstance(result, BadRow):
                    refused.add(at, result)
            progress.update(f"{count:,} rows read")
    show(f"{show_number_of(count, 'row')} of {kind}: {count - len(refused):,} can be used, {len(refused):,} cannot")
    for line in refused.describe().splitlines():
        show(f"  {line}")
    reader.summarize()
    if vocabulary:
        show(vocabulary)
    if count == len(refused):
        raise UserError(f"{path}: no row can be used, for the reasons above.")


def kind_of_rows(row: Row) -> str:
    """Recognize conversations, pairs, chains and prompts by the keys of a row."""
    if isinstance(row.get("answers"), list) and "prompt" in row:
        return "chains"
    if is_pair(row):
        return "pairs"
    turns = row.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    asks = "place" in row and isinstance(last, dict) and last.get("role") == "user"
    return "prompts" if asks else "conversations"


def _shape_of(rows: Rows) -> Shape | None:
    """The shape of the first row that has one, as a training reads the file."""
    shapes = (_or_bad(detect, row) for _, row in rows)
    return next((shape for shape in shapes if not isinstance(shape, BadRow)), None)


def _or_bad(read: Callable[..., T], row: Row | BadRow, *arguments: Any) -> T | BadRow:
    """What a function makes of a row, or why the row cannot be used."""
    try:
        return row if isinstance(row, BadRow) else read(row, *arguments)
    except BadRow as error:
        return error


class _Encoded:
    """Counts tokens of rows, by what they are of, and what of the rows nothing reads."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template, self.unused = template, Unused()
        self.lengths: dict[str, list[int]] = {}

    def add(self, **tokens: int) -> None:
        for name, number in tokens.items():
            self.lengths.setdefault(name, []).append(number)

    def summarize(self) -> None:
        if self.unused:
            show(f"  {self.unused.describe()}")
        figures = {"rows": 0, "shortest": 3, "median": 0, "90%": 2, "99%": 1, "longest": 0, "sum": 4}
        table = Table(["tokens", *numbers(figures)])
        for name, lengths in self.lengths.items():
            ordered = sorted(lengths)
            marks = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.5, 0.9, 0.99, 1)]
            table.add(name, *(f"{number:,}" for number in (len(ordered), *marks, sum(ordered))))
        if self.lengths:
            show(table)


class _Conversations(_Encoded):
    """Reads conversations, as SFT does."""

    def __init__(self, template: ChatTemplate, shape: Shape | None, train_on: TrainOn) -> None:
        super().__init__(template)
        self.shape, self.train_on = shape, train_on

    def _read(self, row: Row, place: str) -> Conversation:
        return conversation_of(row, place, self.shape or detect(row))

    def show(self, console: Console, row: Row, place: str) -> None:
        messages = self._read(row, place).messages
        ids, trained = self.template.encode(messages, self.train_on)
        # Runs of tokens that are learned, or not: what the model sees, and not what the row holds.
        starts = [0, *(i for i in range(1, ids.size) if trained[i] != trained[i - 1])]
        runs = [(ids[a:b].tolist(), bool(trained[a])) for a, b in zip(starts, [*starts[1:], ids.size], strict=True)]
        _print_runs(console, runs, self.template)
        turns = visible(", ".join(message.role for message in messages))
        marks = _legend(console)
        console.print(f"{ids.size:,} tokens, {int(trained.sum()):,} of them trained ({marks}); turns: {turns}")

    def count(self, block: Block) -> list[Any]:
        held = [_or_bad(self._read, row, place) for place, row in block]
        good = [one for one in held if not isinstance(one, BadRow)]
        for one in good:
            self.unused.add(one.unused)
        encoded = iter(self.template.encode_batch([one.messages for one in good], self.train_on, self.unused))
        results = [one if isinstance(one, BadRow) else next(encoded) for one in held]
        for found in results:
            if not isinstance(found, BadRow):
                self.add(conversation=found[0].size, trained=int(found[1].sum()))
        return results


class _Pairs(_Encoded):
    """Reads preference pairs and answers with a label."""

    def show(self, console: Console, row: Row, place: str) -> None:
        pair = pair_of(row, place)
        prompt = self.template.encode_prompt(pair.prompt)
        _print_runs(console, [(prompt.tolist(), False)], self.template)
        counts = [f"prompt {prompt.size:,} tokens"]
        for name in SIDES:
            answer = pair.answer(name)
            if answer is None:
                counts.append(f"no {name} answer")
                continue
            ids = self.template.encode_answer(answer)
            console.print(f"\n{name}:", style="bold")
            _print_runs(console, [(ids.tolist(), True)], self.template)
            counts.append(f"{name} {ids.size:,}")
        console.print(f"{', '.join(counts)}; answers are trained ({_legend(console)})")

    def _count(self, row: Row, place: str) -> None:
        pair = pair_of(row, place)
        counts = {"prompt": self.template.encode_prompt(pair.prompt, self.unused).size}
        self.unused.add(pair.unused)
        for side in SIDES:
            if (answer := pair.answer(side)) is not None:
                counts[side] = self.template.encode_answer(answer, self.unused).size
        self.add(**counts)

    def count(self, block: Block) -> list[Any]:
        return [_or_bad(self._count, row, place) for place, row in block]


class _Chains:
    """Reads what a round writes: prompts, and their answers with rewards."""

    def __init__(self) -> None:
        self.turns: list[list[tuple[bool, Any]]] = []  # of each turn: whether the model ended its answers, rewards

    def show(self, console: Console, row: Row, _: str) -> None:
        messages, answers = _chain(row)
        parts = [(message.role, message.content) for message in messages]
        parts += [("the data's answer", gold)] if isinstance(gold := row.get("gold"), str) else []
        for number, answer in enumerate(answers, 1):
            said = [f"reward {answer['reward']:.4g}"] if _is_number(answer.get("reward")) else []
            said += ["ended by the model" if answer.get("ended") else "cut off at the longest length"]
            parts.append((f"answer {number} ({', '.join(said)})", answer["text"]))
        for title, text in parts:
            console.print(visible(f"{title}:"), style="bold", markup=False)
            console.print(visible(text), markup=False)
        if isinstance(short := row.get("short"), str):
            console.print(f"no further answer: {visible(short)}", markup=False)

    def _count(self, row: Row) -> None:
        for turn, answer in enumerate(_chain(row)[1]):
            if turn == len(self.turns):
                self.turns.append([])
            self.turns[turn].append((bool(answer.get("ended")), answer.get("reward")))

    def count(self, block: Block) -> list[Any]:
        return [_or_bad(self._count, row) for _, row in block]

    def summarize(self) -> None:
        table = Table(["turn", *numbers(dict.fromkeys(("answers", "ended", "mean reward"), 0))])
        for turn, answers in enumerate(self.turns):
            rewards = [reward for _, reward in answers if _is_number(reward)]
            mean = f"{sum(rewards) / len(rewards):.4g}" if rewards else "-"
            name = "first answer" if turn == 0 else f"refinement {turn}"
            table.add(name, f"{len(answers):,}", f"{sum(ended for ended, _ in answers) / len(answers):.1%}", mean)
        if self.turns:
            show(table)


def _chain(row: Row) -> tuple[list[Message], list[Row]]:
    """Return prompt and answers of a chain; a prompt that waits for answers has none."""
    messages = messages_of(row.get("prompt", row.get("messages")))
    answers = row.get("answers", [])
    if not isinstance(answers, list) or not all(
        isinstance(a, dict) and isinstance(a.get("text"), str) for a in answers
    ):
        raise BadRow("holds answers that are no list of objects with a text")
    return messages, answers


def _print_runs(console: Console, runs: Sequence[tuple[list[int], bool]], template: ChatTemplate) -> None:
    text = Text()
    for ids, trained in runs:
        said = visible(template.tokenizer.decode(ids))
        if trained and not _coloured(console):
            said = f"{_OPEN}{said}{_CLOSE}"
        text.append(terminal.encodable(said, console.encoding), style=_TRAINED if trained else "")
    console.print(text)


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _legend(console: Console) -> str:
    return "green" if _coloured(console) else terminal.encodable(f"between {_OPEN} and {_CLOSE}", console.encoding)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
