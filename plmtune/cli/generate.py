"""``plmtune generate``: write text with a checkpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import click

from plmtune.cli import options
from plmtune.cli.options import option
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.tokenizers.message import BadRow, Message


@click.command()
@click.argument("checkpoint", required=False)
@option("--prompt TEXT", "Continue this text; - reads it from stdin.", required=True)
@option("--chat", "Send the prompt as a user's message through the chat template.")
@options.chat_options
@options.sampling_options
@options.device_option
@options.import_option
def generate(
    checkpoint: str | None,
    prompt: str,
    chat: bool,
    system: str | None,
    chat_template: str | None,
    device: str | None,
    **sampling: Any,
) -> None:
    """Generate text with a checkpoint, a model directory, a run or a model of the hub (OWNER/NAME).

    The default is the newest finished run.

    Print the text to stdout as it is generated, and the speed to stderr.

    \b
    plmtune generate runs/demo/latest --prompt "def "
    plmtune generate runs/demo_sft/latest --chat --prompt "What is a stack?"
    """
    checkpoint = options.find_model(checkpoint, "generate CHECKPOINT --prompt TEXT")

    import plmtune
    from plmtune.inference.sampling import complete, prompt_ids
    from plmtune.tokenizers.chat_template import find_template

    refuse_without_chat(chat, chat_template, system)
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"The prompt on stdin is not UTF-8: {error}.") from error
    where = options.find_device(device)
    model, tokenizer = plmtune.load(checkpoint, where)
    start: str | list[int] = prompt
    if chat:
        warn_of_pretrained(checkpoint)
        template = find_template(chat_template, tokenizer, "--chat-template ")
        messages = [Message("system", system)] if system is not None else []
        with usable("The message"):
            start = template.encode_prompt([*messages, Message("user", prompt)]).tolist()
        sampling["end_ids"] = [template.end_id]
    read, asked = prompt_ids(tokenizer, start), sampling["max_new_tokens"]
    if 0 < (room := model.max_seq_len - len(read)) < asked:
        terminal.say(
            f"--max-new-tokens {asked:,}: at most {room:,} are written, as the context of {model.max_seq_len:,} tokens "
            f"holds the {len(read):,} of the prompt, too"
        )
    pieces = complete(model, tokenizer, read, **sampling)
    try:
        speed = stream(pieces)
    except ValueError as error:
        raise UserError(f"{error}.{' Shorten the prompt.' if room < 1 else ''}") from error
    except FloatingPointError as error:
        raise UserError(f"{checkpoint}: {error}.") from error
    terminal.say(speed)


def stream(pieces: Iterable[str]) -> str:
    """Write what `complete` yields to stdout, and a line end; return the number of tokens and the speed.

    On a terminal control characters are escaped.
    """
    count, first = 0, 0.0
    for piece in pieces:
        sys.stdout.write(terminal.shown(piece, sys.stdout))
        sys.stdout.flush()
        count += 1
        # Counted from the second token on: the first carries the prompt and the start of the kernels.
        first = first or time.perf_counter()
    sys.stdout.write("\n")
    sys.stdout.flush()
    seconds = time.perf_counter() - first
    rate = f", {(count - 2) / seconds:.1f} tokens/s after the first" if count > 2 and seconds > 0 else ""
    return f"{max(count - 1, 0)} tokens{rate}"


def refuse_without_chat(chat: bool, chat_template: str | None, system: str | None) -> None:
    """Refuse options of a chat without --chat."""
    for name, value in (("--chat-template", chat_template), ("--system", system)):
        if value is not None and not chat:
            raise UserError(f"{name} says how a message is put to the model. Add --chat.")


def warn_of_pretrained(checkpoint: str) -> None:
    """Warn on stderr if the run of a checkpoint only pretrained."""
    path = Path(checkpoint)
    for directory in (path, *path.absolute().parents[:2]):
        config = directory / "config.yaml"
        if config.is_file():
            with config.open(encoding="utf-8", errors="replace") as file:
                if any(line.rstrip() == "recipe: pretrain" for line in islice(file, 500)):
                    taught = "this model was pretrained, not taught to answer: plmtune run sft init_from="
                    terminal.say(f"{taught}{checkpoint}")
            return


@contextmanager
def usable(what: str, otherwise: str = "") -> Iterator[None]:
    """Refuse messages that cannot be used, and say what happens otherwise."""
    try:
        yield
    except BadRow as error:
        raise UserError(f"{what} {error}.{otherwise}") from error
