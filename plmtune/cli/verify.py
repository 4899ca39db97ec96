"""``plmtune verify``: whether an export is the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from plmtune.cli.options import json_option, threads_option
from plmtune.config.names import check_model_path
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.tables import show

if TYPE_CHECKING:
    from plmtune.export.runtimes import RuntimeName

_RUNTIMES = ("llama_cpp", "xllamacpp", "transformers", "executorch", "plmtune")


@click.command()
@click.argument("export", type=click.Path(path_type=Path))
@click.option(
    "--against",
    required=True,
    metavar="CHECKPOINT",
    help="Compare with this checkpoint, model directory, run or model of the hub.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compare log-probabilities on the text of FILE (default: a built-in page).",
)
@click.option(
    "--positions",
    type=click.IntRange(1),
    metavar="N",
    default=256,
    show_default=True,
    help="Compare the log-probabilities of N tokens.",
)
@click.option(
    "--runtime",
    type=click.Choice(_RUNTIMES),
    metavar="NAME",
    help=f"Choose the runtime if several can load the file: {', '.join(_RUNTIMES)}.",
)
@threads_option
@json_option
def verify(
    export: Path,
    against: str,
    text: Path | None,
    positions: int,
    runtime: RuntimeName | None,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Run EXPORT (a .gguf, a .pte, a model directory) in the program that serves it, and compare it with CHECKPOINT.

    The command compares tensors, settings, log-probabilities on text, generated tokens, token ids and chat prompts. If
    one differs, it looks for the cause. The exit code is 1 if the export is not the model. The loss from a quantized
    type is shown and is no error.

    \b
    plmtune verify exports/plm-q8_0.gguf --against runs/demo/latest
    """
    check_model_path(against)
    page = _read(text) if text is not None else None

    from plmtune.export.verify import verify as verify_export
    from plmtune.io.atomic import write_atomically

    report = verify_export(export, against, text=page, positions=positions, threads=threads, prefer=runtime)
    show(report.table(), *(f"warning: {warning}" for warning in report.warnings))
    if json_path is not None:
        write_atomically(json_path, report.as_json(), user_error=True)
    if not report.passed:
        terminal.echo(f"plmtune: {export} is not the model of {against}: {report.verdict}", err=True)
        click.get_current_context().exit(1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}). Give a text file.") from error
