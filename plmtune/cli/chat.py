"""``plmtune chat``: a conversation with a checkpoint in the terminal, or through a pipe."""

from __future__ import annotations

import io
import json
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plmtune.cli import options
from plmtune.cli.generate import stream, usable, warn_of_pretrained
from plmtune.errors import UserError, did_you_mean
from plmtune.io import terminal
from plmtune.io.atomic import write_atomically
from plmtune.io.tables import Column, Table

if TYPE_CHECKING:
    from plmtune.inference.chat_session import ChatSession

_BLOCK = '"""'


@click.command()
@click.argument("checkpoint", required=False)
@options.chat_options
@options.sampling_options
@options.device_option
@options.import_option
def chat(
    checkpoint: str | None, system: str | None, chat_template: str | None, device: str | None, **sampling: Any
) -> None:
    """Chat with a checkpoint, a model directory, a run's newest checkpoint, or a model of the hub (OWNER/NAME).

    The default is the newest finished run. From a pipe each line of stdin is a message, and only the answers go to
    stdout.

    \b
    plmtune chat runs/demo_sft/latest
    echo "What is a stack?" | plmtune chat runs/demo_sft/latest --temperature 0
    """
    checkpoint = options.find_model(checkpoint, "chat CHECKPOINT")

    import plmtune
    from plmtune.inference.chat_session import ChatSession
    from plmtune.tokenizers.chat_template import find_template

    where = options.find_device(device)
    model, tokenizer = plmtune.load(checkpoint, where)
    conversation = ChatSession(model, tokenizer, find_template(chat_template, tokenizer, "--chat-template "))
    warn_of_pretrained(checkpoint)
    with usable("The text of --system"):
        conversation.instruct(system)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters
    talk = _Talk(conversation, sampling)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # not every system has it
            import readline  # noqa: F401 (which input() then uses)

        terminal.say(f"{checkpoint}: {model.max_seq_len:,} tokens of context. /help lists the commands, Ctrl-D ends.")
    try:
        refused = _converse(talk, interactive)
    except FloatingPointError as error:
        raise UserError(f"{checkpoint}: {error}.") from error
    if refused and not interactive:
        raise UserError(f"{refused} of the messages and commands on stdin could not be used; see above.")


def _converse(talk: _Talk, interactive: bool) -> int:
    """Read messages and commands until stdin ends; return how many could not be used."""
    refused = 0
    interrupted = False  # by the last thing that the person did
    while True:
        try:
            said = _message(interactive)
            interrupted = False
            if said is None or talk.take(*said):
                return refused
        except UserError as error:
            refused += 1
            terminal.say(str(error))
        except KeyboardInterrupt as interrupt:
            if not interactive or interrupted:
                raise
            interrupted = True
            terminal.say(f"\n{interrupt}Ctrl-C again ends, as /quit and Ctrl-D do")


def _message(interactive: bool) -> tuple[str, bool] | None:
    """Read a message; return it and whether it may be a command (a block may not); None at the end."""
    text = _line("> ", interactive)
    if text is None:
        return None
    if text.lstrip().startswith(_BLOCK):
        parts = [text.lstrip().removeprefix(_BLOCK)]
        while not parts[-1].rstrip().endswith(_BLOCK):
            more = _line("... ", interactive)
            if more is None:
                raise UserError(f"The message that {_BLOCK} opens has no {_BLOCK} at its end.")
            parts.append(more)
        return "\n".join(parts).rstrip().removesuffix(_BLOCK).strip(), False
    while text.endswith("\\"):
        text = text.removesuffix("\\") + "\n" + (_line("... ", interactive) or "")
    return text.strip(), True


def _line(prompt: str, interactive: bool) -> str | None:
    """Read a line of stdin, at a terminal with a prompt, a history and line editing."""
    try:
        if not interactive:
            raw = sys.stdin.buffer.readline()
            return raw.decode("utf-8").rstrip("\r\n") if raw else None
        if not sys.stdout.isatty():  # where input() would write the prompt among the answers
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        line = input(prompt)
        line.encode("utf-8")  # Python decodes invalid bytes as surrogates
        return line
    except EOFError:
        terminal.say("")
        return None
    except UnicodeError as error:
        raise UserError(f"The message is not UTF-8: {error}.") from error


@dataclass
class _Talk:
    """A chat session and its commands."""

    conversation: ChatSession
    sampling: dict[str, Any]
    answers: int = 0
    saved: Path | None = None  # the file that holds this conversation

    def take(self, text: str, command: bool) -> bool:
        """Send a message, or run what begins with / as a `command`; return whether the program ends."""
        if not text:
            return False
        if not (command and text.startswith("/")):
            self.ask(text)
            return False
        name, _, rest = text.partition(" ")
        if name not in _COMMANDS:
            raise UserError(
                f"There is no command {name}.{did_you_mean(name, _COMMANDS)} "
                f"To send a message that begins with /, put it between {_BLOCK}."
            )
        if name == "/quit":
            return True
        getattr(self, name.removeprefix("/"))(rest.strip())
        return False

    def ask(self, text: str) -> None:
        talk = self.conversation
        said, forgotten = len(talk.messages), talk.forgotten
        # A question that is repeated after /undo gets another answer; the same input still gets the same answers.
        sampling = self.sampling | {"seed": self.sampling["seed"] + self.answers}
        self.answers += 1
        try:
            with (
                usable("The message", " The conversation continues without it."),
                closing(talk.ask(text, **sampling)) as pieces,
            ):
                speed = stream(pieces)
        except ValueError as error:
            raise UserError(f"{error}. The conversation continues without it.") from error
        except KeyboardInterrupt as interrupt:
            kept = len(talk.messages) > said
            so_far = "what came of the answer is kept, /undo drops it" if kept else "the message is dropped"
            raise KeyboardInterrupt(f"stopped; {so_far}. ") from interrupt
        notes = [speed, f"{talk.context:,} of {talk.model.max_seq_len:,} tokens of context"]
        if talk.cut:
            notes.append("cut there")
        if len(talk.messages) == said:
            notes.append("no answer, so the message is dropped")
        if talk.forgotten > forgotten:
            notes.append(f"the model no longer sees the first {talk.forgotten} messages, for want of room")
        terminal.say("; ".join(notes), dim=True)

    def help(self, _: str) -> None:
        table = Table([Column("", key=True), Column("", folds=True)], headings=False)
        for usage, what in _USAGE.items():
            table.add(usage, what)
        terminal.say("\n".join(table.lines(terminal.columns(sys.stderr), encoding=terminal.encoding(sys.stderr))))

    def system(self, text: str) -> None:
        with usable("The text of /system", " Nothing is changed."):
            self.conversation.instruct(text or None)
        terminal.say("system message set" if text else "no system message", dim=True)

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.saved = None
        terminal.say("a new conversation", dim=True)

    def undo(self, _: str) -> None:
        question = self.conversation.undo()
        if question is None:
            raise UserError("There is nothing to undo.")
        terminal.say(f"dropped with its answer: {question.content}", dim=True)

    def save(self, name: str) -> None:
        path = Path(name).expanduser() if name else self.saved
        if path is None:
            raise UserError("Name the file: /save talk.jsonl")
        if not self.conversation.messages:
            raise UserError("There is nothing to save yet.")
        if path.suffix not in (".jsonl", ".ndjson", ".json"):
            raise UserError(f"{path}: conversations are read from .jsonl files. Name it so: /save {path.name}.jsonl")
        if path != self.saved and (path.exists() or path.is_symlink()):
            raise UserError(f"{path} exists already. Name another file.")
        row = {"messages": [message.to_row() for message in self.conversation.transcript]}
        write_atomically(path, json.dumps(row, ensure_ascii=False) + "\n", user_error=True)
        self.saved = path
        terminal.say(f"{path}: {len(row['messages'])} messages, as data=conversations reads them", dim=True)

    def load(self, name: str) -> None:
        from plmtune.data.conversations import conversations

        if not name:
            raise UserError("Name the file: /load talk.jsonl")
        found = next(conversations((name,)).conversations(), None)
        if found is None:
            raise UserError(f"{name} holds no conversation.")
        with usable(found.place, " Nothing is changed."):
            self.conversation.restore(found.messages)
        self.saved = None
        terminal.say(f"{found.place}: {len(found.messages)} messages; the last: {found.messages[-1].content}", dim=True)


_USAGE = {
    "/help": "show this",
    "/system TEXT": "set the system message; without TEXT: remove it",
    "/reset": "begin a new conversation",
    "/undo": "drop the latest message and its answer",
    "/save FILE": "write the conversation to FILE.jsonl, as data=conversations reads it",
    "/load FILE": "resume the first conversation of a file",
    "/quit": "end, as Ctrl-D and two times Ctrl-C do; one Ctrl-C stops an answer",
    _BLOCK: "begins and ends a message of several lines; so does \\ at the end of each line but the last",
}
_COMMANDS = [usage.split()[0] for usage in _USAGE if usage.startswith("/")]
