"""``plmtune card``: write a model card from the files of a run or a model directory."""

from __future__ import annotations

from pathlib import Path

import click

from plmtune.cli.options import model_first, option, overwrite_option, refuse_no_folder
from plmtune.io import terminal


@click.command()
@click.argument("words", nargs=-1, metavar="[CHECKPOINT] [RESULT]...")
@option("--out PATH", "Write the card to this file (default: README.md in CHECKPOINT).")
@overwrite_option
def card(words: tuple[str, ...], out: Path | None, overwrite: bool) -> None:
    """Write the model card of CHECKPOINT: a run (its newest checkpoint), a checkpoint or a model directory.

    CHECKPOINT defaults to the newest finished run. RESULTs are JSON files of plmtune eval (default: what the run
    measured of that checkpoint during training). The card marks what no file holds with "Fill in:".

    \b
    plmtune card runs/demo_sft/latest evaluations/
    """
    checkpoint, results = model_first(words, "card CHECKPOINT [RESULT]...")
    if out is not None and out.is_dir():
        out = out / "README.md"
    refuse_no_folder(out)

    from plmtune.evaluation.model_card import write_card
    from plmtune.evaluation.results import load_all

    found = load_all([Path(result) for result in results], terminal.say)
    written = write_card(checkpoint, list(found.values()), out, overwrite=overwrite, sources=list(found))
    open_fields = written.read_text(encoding="utf-8").count("Fill in:")
    terminal.echo(f"{written}: {open_fields} places say Fill in, as no file knows them")
