"""``plmtune verify``: whether an export is the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from plmtune.cli.options import PATH, json_option, option, threads_option
from plmtune.config.names import check_model_path
from plmtune.errors import UserError, unreadable
from plmtune.io import terminal
from plmtune.io.tables import show

_RUNTIMES = ("llama_cpp", "xllamacpp", "transformers", "executorch", "plmtune")


@click.command()
@click.argument("export", type=PATH)
@option(
    "--against CHECKPOINT", "Compare with this checkpoint, model directory, run or model of the hub.", required=True
)
@option("--text FILE", "Compare log-probabilities on the text of FILE (default: a built-in page).")
@option("--positions N", "Compare the log-probabilities of N tokens.", default=256)
@option(
    "--runtime NAME",
    f"Choose the runtime if several can load the file: {', '.join(_RUNTIMES)}.",
    "prefer",
    type=click.Choice(_RUNTIMES),
)
@threads_option
@json_option
def verify(export: Path, against: str, text: Path | None, json_path: Path | None, **how: Any) -> None:
    """Run EXPORT (a .gguf, a .pte, a model directory) in the program that serves it, and compare it with CHECKPOINT.

    The command compares tensors, settings, log-probabilities on text, generated tokens, token ids and chat prompts. If
    one differs, it looks for the cause. The exit code is 1 if the export is not the model. The loss from a quantized
    type is shown and is no error.

    \b
    plmtune verify exports/plm-q8_0.gguf --against runs/demo/latest
    """
    check_model_path(against)
    try:
        page = text.read_text(encoding="utf-8") if text is not None else None
    except OSError as error:
        raise unreadable(text, error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{text} is not UTF-8 (byte {error.start:,}). Give a text file.") from error

    from plmtune.export.verify import verify as verify_export
    from plmtune.io.atomic import write_atomically

    report = verify_export(export, against, text=page, **how)
    show(report.table(), *(f"warning: {warning}" for warning in report.warnings))
    if json_path is not None:
        write_atomically(json_path, report.as_json(), user_error=True)
    if not report.passed:
        terminal.say(f"plmtune: {export} is not the model of {against}: {report.verdict}")
        click.get_current_context().exit(1)
