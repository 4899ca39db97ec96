"""The command line: one file a command. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import click

from plmtune import __version__
from plmtune.errors import UserError, did_you_mean

# name -> (module, attribute, one line for --help); the module is imported when the command runs.
COMMANDS = {
    "run": ("plmtune.cli.run", "run", "Run a recipe: plmtune run pretrain [FILE.yaml] [key=value ...]"),
    "resume": ("plmtune.cli.run", "resume", "Go on with a stopped run: plmtune resume RUN_DIR"),
    "ls": ("plmtune.cli.ls", "ls", "List recipes, configs and groups, or the components of a group"),
    "cp": ("plmtune.cli.cp", "cp", "Copy a shipped config or recipe, to change it"),
    "validate": ("plmtune.cli.validate", "validate", "Check a config and build its model without memory"),
    "data": ("plmtune.cli.data", "data", "Prepare and inspect token shards"),
    "tokenizer": ("plmtune.cli.tokenizer", "tokenizer", "Train and inspect tokenizers"),
    "generate": ("plmtune.cli.generate", "generate", "Write text with a checkpoint"),
}


class Commands(click.Group):
    """Commands are imported when named, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise UserError(f"There is no command {args[0]}.{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="plmtune")
def cli() -> None:
    """plmtune trains small language models for edge devices.

    \b
    plmtune run pretrain                        learn from the Python standard library
    plmtune run pretrain conf/plm_1.8b.yaml     the paper's PLM-1.8B
    plmtune generate runs/pretrain/latest --prompt "def "
    """


def main() -> None:
    """Entry point: mistakes are one sentence on stderr and exit code 2, never a traceback."""
    try:
        code = cli.main(prog_name="plmtune", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        print(f"plmtune: {error}", file=sys.stderr)
        code = 2
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        print("plmtune: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader (head, less) left; the rest of the output has no one to go to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    code = code if isinstance(code, int) else 0
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of several processes failed: shutting down in order could wait for the others for ever, and torchrun
        # ends them as soon as this one is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def import_option(function: click.decorators.FC) -> click.decorators.FC:
    """``--import MODULE``: a user's own components, named by the person and never by a config."""

    def load(ctx: click.Context, option: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
        from plmtune.registry import import_module

        for name in names:
            import_module(name)
        return names

    return click.option(
        "--import",
        "imports",
        multiple=True,
        metavar="MODULE",
        callback=load,
        expose_value=False,
        is_eager=True,
        help="Python module with your own registered components; may be repeated.",
    )(function)


def short(path: Path) -> str:
    """A path as a person would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
