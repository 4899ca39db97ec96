"""The command line: one file a command. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import itertools
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import click

from plmtune import __version__
from plmtune.cli.help import Context, lay_out
from plmtune.cli.usage import sentence
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.signals import end_in_order

# name -> one line for --help. The command is imported when it runs.
COMMANDS = {
    "run": "Run a recipe: plmtune run NAME [FILE.yaml] [KEY=VALUE]",
    "resume": "Resume a stopped run: plmtune resume [RUN_DIR] [KEY=VALUE]",
    "launch": "Start a run on many processes: here, or on Slurm",
    "runs": "List runs: status, step, loss and time of each",
    "checkpoints": "List a run's checkpoints and verify them",
    "ls": "List recipes, configs and groups, or the components of a group",
    "cp": "Copy a built-in config or recipe to change it",
    "validate": "Check a config and build its model without memory",
    "data": "Prepare and inspect token shards",
    "tokenizer": "Train and inspect tokenizers",
    "generate": "Write text with a checkpoint",
    "chat": "Chat with a checkpoint in the terminal",
    "perplexity": "Measure how well a checkpoint predicts text",
    "eval": "Evaluate checkpoints on tasks: plmtune eval --tasks gsm8k,humaneval",
    "convert": "Convert a GGUF file to a model directory",
    "compare": "Compare results of eval and test their differences for significance",
    "card": "Write a model card from a run and its results",
    "export": "Export a checkpoint to llama.cpp, transformers or ExecuTorch and verify it",
    "verify": "Verify that an exported file is the model of a checkpoint",
    "bench": "Measure time to first token, tokens/s and memory of models and files",
    "plan": "Predict speed and memory of a config on a device",
    "merge": "Merge adapters into their base, or several models into one",
}


class Commands(click.Group):
    """Commands are imported when named, so that --help answers at once."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"plmtune.cli.{'run' if name == 'resume' else name}")
        return lay_out(getattr(module, "evaluate" if name == "eval" else name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from plmtune.config.names import name_hint

            raise UserError(f"There is no command {args[0]}.{name_hint(args[0], COMMANDS)}")
        for before, word in itertools.pairwise(args):
            if not word.strip() and not before.startswith("-"):  # pathlib reads it as the current folder
                raise UserError(f"plmtune {args[0]}: the argument after {before} is empty. Give a name or a path.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would end with code 1
            _let_go_of_stdout()  # the reader (head, less) left; the rest of the output has no one to go to
            return READER_LEFT

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="plmtune")
def cli() -> None:
    """Train small language models for edge devices.

    \b
    plmtune run demo                         train a small model in minutes
    plmtune run pretrain conf/plm_1.8b.yaml  train the paper's PLM-1.8B
    plmtune generate runs/demo/latest --prompt "def "
    plmtune run demo_sft                     train it to answer
    plmtune run demo_dpo                     train it to prefer answers
    plmtune chat runs/demo_sft/latest        chat with it
    plmtune eval --tasks gsm8k,humaneval     evaluate the newest model
    plmtune plan plm_1.8b --device pi5       predict its speed on a device
    plmtune run quantize                     quantize it to 4 bits a weight
    plmtune export runs/demo_sft/latest --to gguf --quant q4_k_m
    """


# Errors of the system that a person can fix, and how.
SYSTEM_ERRORS = {
    errno.ENOSPC: "Make room on that disk, then give the command again",
    errno.EDQUOT: "The disk quota is used up: make room, then give the command again",
    errno.EFBIG: "Files may not grow so large here: see ulimit -f, or use another disk",
    errno.EROFS: "Name a place that can be written to",
    errno.EACCES: "Change its permissions, or name another place",
    errno.EPERM: "Change its permissions, or name another place",
    errno.EIO: "The device fails, or is gone: look at the system's log",
}
READER_LEFT = 141  # as a shell has it of a process that SIGPIPE ended
# Under torchrun: how long to wait for rank 0 to report the same error before reporting it once more.
WAIT_FOR_RANK_0 = 3.0


def main() -> None:
    """Entry point: mistakes are one sentence on stderr and exit code 2, never a traceback."""
    terminal.open_closed_streams()
    terminal.use_plain_characters()
    logging.lastResort = terminal.Warnings(logging.WARNING)
    # At exit Python looks for cycles among all that torch and its packages made: half a CPU second for nothing.
    atexit.register(gc.freeze)
    words, alone = "", int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone:  # one of several may stand in a collective operation, which no exception ends
        end_in_order()
    try:
        try:
            import fcntl  # noqa: F401
        except ImportError:
            raise UserError(
                "This system has no fcntl, by which a run's directory is locked: plmtune runs on Linux and macOS. "
                "On Windows use WSL."
            ) from None
        code = cli.main(prog_name="plmtune", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        words, code = f"plmtune: {error}", 2
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        words, code = sentence(error), 2
    except (KeyboardInterrupt, click.Abort):
        words, code = "plmtune: interrupted", 130
    except BrokenPipeError:
        _let_go_of_stdout()
        code = READER_LEFT
    except Exception as error:
        if not isinstance(error, OSError) or error.errno not in SYSTEM_ERRORS:
            if not alone:
                _end_rank(traceback.format_exc(), 1)
            raise
        if error.filename is None:
            _let_go_of_stdout()  # it may be what cannot be written
        place = f"{error.filename}: " if error.filename is not None else ""
        words, code = f"plmtune: {place}{error.strerror}. {SYSTEM_ERRORS[error.errno]}", 2
    code = code if isinstance(code, int) else 0
    if code and not alone:
        _end_rank(words, code)
    if words:
        terminal.say(words)
    sys.exit(code)


def _end_rank(words: str, code: int) -> NoReturn:
    """End one of several processes at once.

    Shutting down in order could wait for the others for ever, and torchrun ends them as soon as this one is gone.
    """
    rank, now = int(os.environ.get("RANK", "0")), time.time()
    if rank != 0:
        # Usually all ranks fail in the same way and rank 0 reports it; otherwise this rank's report is the only one.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(WAIT_FOR_RANK_0)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        if words:
            terminal.say(f"[rank {rank}] {words}" if rank or "\n" in words else words)
            if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                # torchrun shows the file in its summary: who failed first, and why. It is as the ErrorHandler of
                # torch.distributed.elastic writes it, which would import torch, and knows tracebacks only.
                details = {"py_callstack": words, "timestamp": str(int(now))}
                message = {"message": words.splitlines()[-1], "extraInfo": details}
                Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    os._exit(code)


def _let_go_of_stdout() -> None:
    """Lead what is still buffered to nowhere, or the interpreter would fail over it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def short(path: Path) -> str:
    """A path as a person would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
