"""What ``plmtune data inspect FILE`` shows: a conversation, a pair or a chain of answers, and the file in short."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmtune.cli.tokenizer import find_tokenizer
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.terminal import Progress, visible
from plmtune.tokenizers.message import BadRow, Unused
from plmtune.units import show_number_of

if TYPE_CHECKING:
    from rich.console import Console

    from plmtune.data.conversations import Shape
    from plmtune.data.rows import Refused, Rows
    from plmtune.tokenizers.chat_template import ChatTemplate, TrainOn
    from plmtune.tokenizers.message import Message
    from plmtune.tokenizers.tokenizer import Tokenizer

_TRAINED = "bold green"
_OPEN, _CLOSE = "⟦", "⟧"
_BLOCK = 512


@dataclass
class _Seen:
    """Counts of a file's rows."""

    lengths: dict[str, list[int]] = field(default_factory=dict)  # tokens, by what they are of
    rewards: list[list[float]] = field(default_factory=list)  # by turn
    ended: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    unused: Unused = field(default_factory=Unused)  # rows by what of them nothing reads

    def length(self, what: str, tokens: int) -> None:
        self.lengths.setdefault(what, []).append(tokens)


def inspect_rows(path: Path, *, row: int, tokenizer: str, template: str | None, train_on: TrainOn) -> None:
    """Show one row of a file with its tokens, then the file in short.

    Args:
        path: conversations, preference pairs, or what a round wrote (prompts, chains, pairs).
        row: which to show, from 1.
        tokenizer: a name, file, directory or run.
        template: the chat template; None: the tokenizer's own.
        train_on: the answers that are learned.

    Raises:
        UserError: if the file cannot be read, has no such row or none that can be used, or the template cannot be
            used.
    """
    from rich.console import Console

    from plmtune.data.rows import Refused, Rows
    from plmtune.tokenizers.chat_template import find_template

    console = Console(highlight=False, width=terminal.columns(sys.stdout), soft_wrap=not sys.stdout.isatty())
    rows = Rows([str(path)])
    kind = kind_of_rows(next((held for _, held in rows if isinstance(held, dict)), {}))
    shape = _shape_of(rows) if kind == "conversations" else None
    found = find_template(template, find(tokenizer)) if kind in ("conversations", "pairs") else None
    place, asked = next(islice(rows, row - 1, None), (None, None))
    if place is None:
        held = sum(1 for _ in rows)
        raise UserError(f"--row {row}: {path} has {show_number_of(held, 'row')}" if held else f"{path} holds no rows")
    refused, seen = Refused(), _Seen()
    console.print(visible(place), style="bold", markup=False)
    try:
        if isinstance(asked, BadRow):
            raise asked
        assert asked is not None
        if kind == "conversations":
            _show_conversation(console, asked, place, shape, found, train_on)
        elif kind == "pairs":
            _show_pair(console, asked, place, found)
        else:
            _show_chain(console, asked)
    except BadRow as error:
        console.print(visible(f"cannot be used: it {error}"), markup=False)
    console.print()
    count = _read_all(rows, kind, shape, found, train_on, seen, refused)
    _summary(kind, count, seen, refused, found)
    if count == len(refused):
        raise UserError(f"{path}: no row can be used, for the reasons above.")


def kind_of_rows(row: dict[str, Any]) -> str:
    """Recognize conversations, pairs, chains and prompts by the keys of a row."""
    from plmtune.data.preferences import is_pair

    if isinstance(row.get("answers"), list) and "prompt" in row:
        return "chains"
    if is_pair(row):
        return "pairs"
    turns = row.get("messages")
    if "place" in row and isinstance(turns, list) and turns and _role(turns[-1]) == "user":
        return "prompts"
    return "conversations"


def _shape_of(rows: Rows) -> Shape | None:
    """The shape of the first row that has one, as a training reads the file."""
    from plmtune.data.conversations import detect

    for _, row in rows:
        if isinstance(row, dict):
            try:
                return detect(row)
            except BadRow:
                continue
    return None


def find(text: str) -> Tokenizer:
    """Return the tokenizer of a name, a file or directory, or a run's newest checkpoint."""
    path = Path(text)
    if path.is_dir() and not (path / "tokenizer.json").exists() and (path / "checkpoints").is_dir():
        from plmtune.models.checkpoint_files import checkpoint_directory

        return find_tokenizer(str(checkpoint_directory(path)))
    return find_tokenizer(text)


def _show_conversation(
    console: Console,
    row: dict[str, Any],
    place: str,
    shape: Shape | None,
    template: ChatTemplate | None,
    train_on: TrainOn,
) -> None:
    from plmtune.data.conversations import conversation_of, detect

    assert template is not None
    messages = conversation_of(row, place, shape or detect(row)).messages
    ids, trained = template.encode(messages, train_on)
    # Runs of tokens that are learned, or not: what the model sees, and not what the row holds.
    starts = [0, *(i for i in range(1, ids.size) if trained[i] != trained[i - 1])]
    runs = [(ids[a:b].tolist(), bool(trained[a])) for a, b in zip(starts, [*starts[1:], ids.size], strict=True)]
    _print_runs(console, runs, template)
    turns = visible(", ".join(message.role for message in messages))
    console.print(f"{ids.size:,} tokens, {int(trained.sum()):,} of them trained ({_legend(console)}); turns: {turns}")


def _show_pair(console: Console, row: dict[str, Any], place: str, template: ChatTemplate | None) -> None:
    from plmtune.data.preferences import SIDES, pair_of

    assert template is not None
    pair = pair_of(row, place)
    prompt = template.encode_prompt(pair.prompt)
    _print_runs(console, [(prompt.tolist(), False)], template)
    counts = [f"prompt {prompt.size:,} tokens"]
    for name in SIDES:
        answer = pair.answer(name)
        if answer is None:
            counts.append(f"no {name} answer")
            continue
        ids = template.encode_answer(answer)
        console.print(f"\n{name}:", style="bold")
        _print_runs(console, [(ids.tolist(), True)], template)
        counts.append(f"{name} {ids.size:,}")
    console.print(f"{', '.join(counts)}; answers are trained ({_legend(console)})")


def _show_chain(console: Console, row: dict[str, Any]) -> None:
    messages, answers = _chain(row)
    for message in messages:
        console.print(f"{visible(message.role)}:", style="bold")
        console.print(visible(message.content), markup=False)
    if isinstance(gold := row.get("gold"), str):
        console.print("the data's answer:", style="bold")
        console.print(visible(gold), markup=False)
    for number, answer in enumerate(answers, 1):
        said = [f"reward {answer['reward']:.4g}"] if _is_number(answer.get("reward")) else []
        said += ["ended by the model" if answer.get("ended") else "cut off at the longest length"]
        console.print(f"answer {number} ({', '.join(said)}):", style="bold")
        console.print(visible(answer["text"]), markup=False)
    if isinstance(short := row.get("short"), str):
        console.print(f"no further answer: {visible(short)}", markup=False)


def _read_all(
    rows: Rows,
    kind: str,
    shape: Shape | None,
    template: ChatTemplate | None,
    train_on: TrainOn,
    seen: _Seen,
    refused: Refused,
) -> int:
    """Count every row; rows that cannot be used are counted by reason, without their text."""
    read: Callable[[Sequence[tuple[str, dict[str, Any]]]], list[BadRow | None]]
    if kind == "conversations":
        assert template is not None
        read = _conversation_counter(shape, template, train_on, seen)
    elif kind == "pairs":
        assert template is not None
        read = _pair_counter(template, seen)
    else:
        read = _chain_counter(seen)
    count = 0
    progress = Progress()
    remaining = iter(rows)
    while block := list(islice(remaining, _BLOCK)):
        count += len(block)
        good = [(place, row) for place, row in block if not isinstance(row, BadRow)]
        for place, row in block:
            if isinstance(row, BadRow):
                refused.add(place, row)
        for (place, _), error in zip(good, read(good), strict=True):
            if error is not None:
                refused.add(place, error)
        progress.update(f"{count:,} rows read")
    progress.close()
    return count


def _conversation_counter(shape: Shape | None, template: ChatTemplate, train_on: TrainOn, seen: _Seen) -> Any:
    from plmtune.data.conversations import conversation_of, detect

    def read(block: Sequence[tuple[str, dict[str, Any]]]) -> list[BadRow | None]:
        messages: list[tuple[Message, ...] | BadRow] = []
        for place, row in block:
            try:
                held = conversation_of(row, place, shape or detect(row))
                seen.unused.add(held.unused)
                messages.append(held.messages)
            except BadRow as error:
                messages.append(error)
        good = [said for said in messages if not isinstance(said, BadRow)]
        encoded = iter(template.encode_batch(good, train_on, seen.unused))
        errors: list[BadRow | None] = []
        for said in messages:
            result = said if isinstance(said, BadRow) else next(encoded)
            errors.append(result if isinstance(result, BadRow) else None)
            if not isinstance(result, BadRow):
                seen.length("conversation", result[0].size)
                seen.length("trained", int(result[1].sum()))
        return errors

    return read


def _pair_counter(template: ChatTemplate, seen: _Seen) -> Any:
    from plmtune.data.preferences import SIDES, pair_of

    def read(block: Sequence[tuple[str, dict[str, Any]]]) -> list[BadRow | None]:
        errors: list[BadRow | None] = []
        for place, row in block:
            try:
                pair = pair_of(row, place)
                counts = {"prompt": template.encode_prompt(pair.prompt, seen.unused).size}
                seen.unused.add(pair.unused)
                for side in SIDES:
                    if (answer := pair.answer(side)) is not None:
                        counts[side] = template.encode_answer(answer, seen.unused).size
            except BadRow as error:
                errors.append(error)
                continue
            errors.append(None)
            for name, tokens in counts.items():
                seen.length(name, tokens)
        return errors

    return read


def _chain_counter(seen: _Seen) -> Any:
    def read(block: Sequence[tuple[str, dict[str, Any]]]) -> list[BadRow | None]:
        errors: list[BadRow | None] = []
        for _, row in block:
            try:
                _, answers = _chain(row)
            except BadRow as error:
                errors.append(error)
                continue
            errors.append(None)
            for turn, answer in enumerate(answers):
                if turn == len(seen.answers):
                    seen.answers.append(0)
                    seen.ended.append(0)
                    seen.rewards.append([])
                seen.answers[turn] += 1
                seen.ended[turn] += bool(answer.get("ended"))
                if _is_number(answer.get("reward")):
                    seen.rewards[turn].append(answer["reward"])
        return errors

    return read


def _chain(row: dict[str, Any]) -> tuple[list[Message], list[dict[str, Any]]]:
    """Return prompt and answers of a chain; a prompt that waits for answers has none."""
    from plmtune.data.conversations import messages_of

    messages = messages_of(row.get("prompt", row.get("messages")))
    answers = row.get("answers", [])
    if not isinstance(answers, list) or not all(
        isinstance(a, dict) and isinstance(a.get("text"), str) for a in answers
    ):
        raise BadRow("holds answers that are no list of objects with a text")
    return messages, answers


def _summary(kind: str, count: int, seen: _Seen, refused: Refused, template: ChatTemplate | None) -> None:
    from plmtune.io.tables import Table, numbers, show

    show(f"{show_number_of(count, 'row')} of {kind}: {count - len(refused):,} can be used, {len(refused):,} cannot")
    for line in refused.describe().splitlines():
        show(f"  {line}")
    if seen.unused:
        show(f"  {seen.unused.describe()}")
    if seen.lengths:
        figures = {"rows": 0, "shortest": 3, "median": 0, "90%": 2, "99%": 1, "longest": 0, "sum": 4}
        table = Table(["tokens", *numbers(figures)])
        for name, lengths in seen.lengths.items():
            ordered = sorted(lengths)
            marks = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.5, 0.9, 0.99, 1)]
            table.add(name, *(f"{number:,}" for number in (len(ordered), *marks, sum(ordered))))
        show(table)
    if seen.answers:
        table = Table(["turn", *numbers(dict.fromkeys(("answers", "ended", "mean reward"), 0))])
        for turn, answers in enumerate(seen.answers):
            rewards = seen.rewards[turn]
            mean = f"{sum(rewards) / len(rewards):.4g}" if rewards else "-"
            name = "first answer" if turn == 0 else f"refinement {turn}"
            table.add(name, f"{answers:,}", f"{seen.ended[turn] / answers:.1%}", mean)
        show(table)
    if template is not None:
        show(f"{template.where}; {template.tokenizer.num_tokens:,} tokens in the vocabulary")


def _print_runs(console: Console, runs: Sequence[tuple[list[int], bool]], template: ChatTemplate) -> None:
    from rich.text import Text

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


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
