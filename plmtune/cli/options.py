"""Options that several commands have."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from plmtune.config.names import check_model_path
from plmtune.errors import UserError
from plmtune.io import hub, terminal
from plmtune.io.atomic import write_atomically
from plmtune.registry import import_module, importing
from plmtune.units import unescape

if TYPE_CHECKING:
    import torch


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
PATH = click.Path(path_type=Path)


def option(shown: str, help: str, *names: str, **settings: Any) -> Decorator:
    """An option, declared as ``--help`` shows it.

    ``--mask`` is a flag. The word behind another name says what it takes: ``on|off`` one of these, ``N`` a whole number
    from 1 on, ``PATH``, ``FILE`` or ``FILE.png`` a path, any other word a text.

    Args:
        names: other names of the option, and that of its parameter.
        settings: as click has them; `type` and a number as the default replace what the word says.
    """
    name, _, word = shown.partition(" ")
    if not word:
        settings.setdefault("is_flag", True)
    elif re.fullmatch(r"[a-z0-9_|]+", word):
        settings["type"] = click.Choice(word.split("|"))
    else:
        path = re.fullmatch(r"(PATH|DIR|FILE)(\.\w+)?", word)
        settings.setdefault("type", click.IntRange(1) if word == "N" else PATH if path else None)
        settings["metavar"] = word
    return click.option(name, *names, help=help, **settings)


def several(*options: Decorator) -> Decorator:
    """Options as one, in this order in the help."""
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


def _import(ctx: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> None:
    for name in names:
        import_module(name)


# A user's own components, named by the person and never by a config.
import_option = option(
    "--import MODULE",
    "Import a Python module that registers your own components. Can be given several times.",
    "imports",
    multiple=True,
    callback=_import,
    expose_value=False,
    is_eager=True,
)
device_option = option("--device TEXT", "Run on this device: cpu, cuda or cuda:N (default: cuda if there is one).")
dtype_option = option("--dtype fp32|bf16", "Compute in this dtype (default: that of the weights).")
overwrite_option = option("--overwrite", "Replace existing files.")
base_option = option(
    "--base PATH", "Read the base model from this directory (default: the one that the adapters name)."
)
threads_option = option("--threads N", "Use N CPU threads (default: the runtime's own choice).")
chat_options = several(
    option("--system TEXT", "Start the conversation with this system message."),
    option(
        "--chat-template NAME",
        "Use this chat template: chatml, llama3, plain, or a Jinja file (default: the tokenizer's own).",
    ),
)
json_option = option("--json FILE", "Write all figures to FILE as JSON.", "json_path")
print_json_option = option("--json", "Print JSON instead of a table.", "as_json")
text_key_option = option("--text-key TEXT", "Read the text from this key or column.", "--field", default="text")
# How files of text are read.
text_options = several(
    text_key_option,
    option("--format auto|text|jsonl|csv|parquet", "Read files in this format.", default="auto"),
    option("--separator TEXT", r"Split text files into documents at this text (\n is a line feed)."),
    option("--encoding TEXT", "Decode text files in this encoding.", default="utf-8"),
    option("--skip-bad", "Skip and count broken rows instead of stopping."),
)


class _Number(click.FloatRange):
    """A finite number in a range; click's own ranges hold NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{number} is no finite number.", param, ctx)


class _Seed(click.types.IntParamType):
    """A whole number of 64 bits, as torch takes; a chat adds the number of its answers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if -(2**63) <= number < 2**63 else self.fail(f"{number} has more than 64 bits.", param, ctx)


def _stops(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    if "" in texts:
        raise click.BadParameter("a stop string is empty: an answer would end before it begins.", param=parameter)
    try:
        return tuple(unescape(text, "TEXT") for text in texts)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param=parameter) from error


# How text is generated.
sampling_options = several(
    option("--max-new-tokens N", "Generate at most N tokens.", default=256),
    option("--temperature X", "Sample at this temperature; 0 is greedy.", type=_Number(0, 100), default=0.8),
    option("--top-k N", "Sample from the N most likely tokens."),
    option(
        "--top-p X",
        "Sample from the most likely tokens whose probabilities add up to X (nucleus sampling).",
        type=_Number(0, 1, min_open=True),
    ),
    option("--min-p X", "Sample from tokens at least X times as likely as the most likely one.", type=_Number(0, 1)),
    option(
        "--repetition-penalty X",
        "Make tokens of the prompt and the answer less likely; 1 is off.",
        type=_Number(0, 100, min_open=True),
        default=1.0,
    ),
    option(
        "--stop TEXT",
        r"End the answer before TEXT (\n is a line end). Can be given several times.",
        "until",
        multiple=True,
        callback=_stops,
    ),
    option("--seed N", "Seed the sampling with N.", type=_Seed(), default=0),
)


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Import and compose without looking for cycles among what stays: 0.2 CPU seconds of torch's import alone."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def newest_run(command: str) -> str:
    """Return the newest finished run, and name it on stderr with the `command` for another one: "chat CHECKPOINT"."""
    from plmtune.io.run_summary import finished_runs

    newest = next(finished_runs(), None)
    if newest is None:
        raise UserError(
            f"There is no finished run under runs/ (seen from {Path.cwd()}). Name a checkpoint, a model directory, a "
            f"run or a model of the hub: plmtune {command}"
        )
    terminal.say(f"model: {newest}, the newest finished run (for another: plmtune {command})")
    return str(newest)


def find_model(given: str | None, command: str) -> str:
    """Return the model that a command is given, or else the newest finished run. It imports no torch."""
    if given is None:
        return newest_run(command)
    check_model_path(given)
    return given


def model_first(words: Sequence[str], command: str) -> tuple[str, tuple[str, ...]]:
    """Divide words into a model, which may be left out, and the files that follow it."""
    if not words or names_files(words[0]):
        if any(Path(word).is_dir() and not names_files(word) for word in words[1:]):
            raise UserError(f"{words[0]} is no checkpoint, and CHECKPOINT comes first: plmtune {command}")
        return newest_run(command), tuple(words)
    return find_model(words[0], command), tuple(words[1:])


def names_files(text: str) -> bool:
    """Whether a word names a file, a folder of files or a pattern of their names, and no model."""
    path = Path(text)
    if path.is_dir():
        of_models = ("config.json", "adapter_config.json", "config.yaml", "checkpoints", "snapshots", "latest")
        return not (
            path.name.startswith("models--")
            or any((path / name).exists() for name in of_models)
            or any(path.glob("step-*"))
        )
    if path.is_file():
        return not hub.is_gguf(path) and path.name not in ("latest", "best")
    return any(sign in text for sign in "*?[")


def find_device(name: str | None) -> torch.device:
    """Return the device of that name, or the one that there is."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: unknown. Known: cpu, cuda, cuda:N.") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name}: not on this machine ({str(error).splitlines()[0]}).") from error
    return device


def divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the words after a config's name into YAML files and overrides."""
    overlays = [t for t in arguments if t.endswith((".yaml", ".yml")) and ("=" not in t or Path(t).is_file())]
    return overlays, [text for text in arguments if text not in overlays]


def recipe_file(path: str) -> ModuleType:
    """Import a recipe that the person named on the command line; a config can not do this."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such recipe file. Start from ours: plmtune cp recipes/pretrain {path}")
    spec = importlib.util.spec_from_file_location(f"plmtune_recipe_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with importing(path):
        spec.loader.exec_module(module)
    for needed in ("main", "CONFIG"):
        if not hasattr(module, needed):
            raise UserError(
                f"{path}: a recipe defines main(cfg) and CONFIG, the config it starts from; {needed} is missing."
            )
    if hasattr(module, "Config"):
        from plmtune.config.primary import use_schema

        use_schema(module.CONFIG, module.Config, path)
    return module


def words_of(text: str, flag: str) -> list[str]:
    """The words of an option, separated by commas."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise UserError(f"{flag}: names nothing.")
    return words


def lengths_of(text: str, flag: str) -> list[int]:
    """The numbers of tokens of an option, separated by commas, the fewest first."""
    words = words_of(text, flag)
    if not all(word.isdecimal() and 0 < int(word) < 2**24 for word in words):
        raise UserError(f"{flag}: {text!r:.80} must be numbers of tokens with commas, such as 128,2048.")
    return sorted(set(map(int, words)))


def refuse_no_folder(out: Path | None) -> None:
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.")


def check_output(path: Path | None, *suffixes: str) -> None:
    """Refuse a file to write that has another suffix, or no folder."""
    if path is not None and (path.suffix not in suffixes or not path.parent.is_dir()):
        raise UserError(f"{path}: must be a {suffixes[0]} file in a folder that is there.")


def write_json(path: Path, content: Any) -> None:
    """Write the file of --json, and name it."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n", user_error=True)
    terminal.echo(f"{path} written")
