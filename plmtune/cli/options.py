"""Options that several commands have."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from plmtune import dtypes
from plmtune.config.names import check_model_path
from plmtune.errors import UserError
from plmtune.io import hub, terminal
from plmtune.io.atomic import write_atomically
from plmtune.registry import raised, refuse_taken_names
from plmtune.units import unescape

if TYPE_CHECKING:
    import torch

device_option = click.option(
    "--device", help="Run on this device: cpu, cuda or cuda:N (default: cuda if there is one)."
)
dtype_option = click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), help="Compute in this dtype (default: that of the weights)."
)

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace existing files.")
base_option = click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Read the base model from this directory (default: the one that the adapters name).",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Use N CPU threads (default: the runtime's own choice)."
)
system_option = click.option("--system", metavar="TEXT", help="Start the conversation with this system message.")
chat_template_option = click.option(
    "--chat-template",
    metavar="NAME",
    help="Use this chat template: chatml, llama3, plain, or a Jinja file (default: the tokenizer's own).",
)
json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures to FILE as JSON."
)
print_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def text_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How files of text are read."""
    formats = click.Choice(["auto", "text", "jsonl", "csv", "parquet"])
    for option in (
        click.option("--skip-bad", is_flag=True, help="Skip and count broken rows instead of stopping."),
        click.option("--encoding", default="utf-8", show_default=True, help="Decode text files in this encoding."),
        click.option("--separator", help=r"Split text files into documents at this text (\n is a line feed)."),
        click.option("--format", default="auto", show_default=True, type=formats, help="Read files in this format."),
        text_key_option,
    ):
        command = option(command)
    return command


text_key_option = click.option(
    "--text-key", "--field", default="text", show_default=True, help="Read the text from this key or column."
)


def newest_run(command: str) -> str:
    """Return the newest finished run, the default of a command's model, and name it on stderr.

    Args:
        command: the usage that names a model: "chat CHECKPOINT".

    Raises:
        UserError: if there is none.
    """
    from plmtune.io.run_summary import finished_runs

    newest = next(finished_runs(), None)
    if newest is None:
        raise UserError(
            f"There is no finished run under runs/ (seen from {Path.cwd()}). Name a checkpoint, a model directory, a "
            f"run or a model of the hub: plmtune {command}"
        )
    terminal.echo(f"model: {newest}, the newest finished run (for another: plmtune {command})", err=True)
    return str(newest)


def find_model(given: str | None, command: str) -> str:
    """Return the model that a command is given, or else the newest finished run. It imports no torch.

    Raises:
        UserError: for what cannot be a model.
    """
    if given is None:
        return newest_run(command)
    check_model_path(given)
    return given


def model_first(words: Sequence[str], command: str) -> tuple[str, tuple[str, ...]]:
    """Divide words into a model, which may be left out, and the files that follow it.

    Raises:
        UserError: see `find_model`.
    """
    if not words or _names_files(words[0]):
        if any(Path(word).is_dir() and not _names_files(word) for word in words[1:]):
            raise UserError(f"{words[0]} is no checkpoint, and CHECKPOINT comes first: plmtune {command}")
        return newest_run(command), tuple(words)
    return find_model(words[0], command), tuple(words[1:])


def _names_files(text: str) -> bool:
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
    """Return the device of that name, or the one that there is.

    Raises:
        UserError: if this machine has none of that name.
    """
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


def find_dtype(name: str | None) -> torch.dtype | None:
    """Return what `dtype_option` names."""
    return dtypes.from_name(name) if name else None


def _number(_: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuse NaN and infinity, which a range of numbers accepts."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number.", param=parameter)
    return value


def _stops(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    if "" in texts:
        raise click.BadParameter("a stop string is empty: an answer would end before it begins.", param=parameter)
    try:
        return tuple(unescape(text, "TEXT") for text in texts)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param=parameter) from error


def sampling_options(command: click.decorators.FC) -> click.decorators.FC:
    """Sampling options, shared by the commands that generate text."""
    options = (
        click.option(
            "--max-new-tokens",
            type=click.IntRange(1),
            metavar="N",
            default=256,
            show_default=True,
            help="Generate at most N tokens.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0, 100),
            metavar="X",
            default=0.8,
            show_default=True,
            callback=_number,
            help="Sample at this temperature; 0 is greedy.",
        ),
        click.option("--top-k", type=click.IntRange(1), metavar="N", help="Sample from the N most likely tokens."),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            metavar="X",
            callback=_number,
            help="Sample from the most likely tokens whose probabilities add up to X (nucleus sampling).",
        ),
        click.option(
            "--min-p",
            type=click.FloatRange(0, 1),
            metavar="X",
            callback=_number,
            help="Sample from tokens at least X times as likely as the most likely one.",
        ),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(0, 100, min_open=True),
            metavar="X",
            default=1.0,
            show_default=True,
            callback=_number,
            help="Make tokens of the prompt and the answer less likely; 1 is off.",
        ),
        click.option(
            "--stop",
            "until",
            multiple=True,
            metavar="TEXT",
            callback=_stops,
            help=r"End the answer before TEXT (\n is a line end). Can be given several times.",
        ),
        click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Seed the sampling with N."),
    )
    for option in reversed(options):
        command = option(command)
    return command


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
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {raised(error)}") from error
    for needed in ("main", "CONFIG"):
        if not hasattr(module, needed):
            raise UserError(
                f"{path}: a recipe defines main(cfg) and CONFIG, the config it starts from; {needed} is missing."
            )
    refuse_taken_names()
    if hasattr(module, "Config"):
        from plmtune.config.primary import use_schema

        use_schema(module.CONFIG, module.Config, path)
    return module


def write_json(path: Path, content: Any) -> None:
    """Write the file of --json, and name it."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n", user_error=True)
    terminal.echo(f"{path} written")
