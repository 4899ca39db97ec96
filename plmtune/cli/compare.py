"""``plmtune compare``: results of evaluations side by side, and whether their differences are more than chance."""

from __future__ import annotations

import json
from pathlib import Path

import click

from plmtune.cli.options import PATH, option, refuse_no_folder
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.tables import show


@click.command()
@click.argument("results", nargs=-1, type=PATH, metavar="[RESULT]...")
@option("--out PATH", "Write the plot to this PNG, replacing it (default: compare.png; none with --json).")
@option("--json", "Print JSON instead of tables.", "as_json")
@option("--all", "Show the tasks of groups as well (MMLU has 57).", "all_tasks")
def compare(results: tuple[Path, ...], out: Path | None, as_json: bool, all_tasks: bool) -> None:
    """Compare RESULTs, the JSON files of plmtune eval (or folders of them), with the first one.

    RESULTs default to those in evaluations/. Where two have the same prompts, their answers are compared question by
    question.

    \b
    plmtune compare evaluations/a.json evaluations/b.json
    plmtune compare evaluations/ --out figure.png
    """
    from plmtune.evaluation.result_table import table
    from plmtune.evaluation.results import HOW_TO_MAKE, load_all

    if not results:
        results = (Path("evaluations"),)
        if not results[0].is_dir():
            raise UserError(f"There is no folder evaluations/ here. {HOW_TO_MAKE}")
        terminal.say("results: those in evaluations/ (for others: plmtune compare RESULT...)")
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is a PNG, and its name must end in .png.")
    refuse_no_folder(out)

    from plmtune.evaluation import comparison
    from plmtune.evaluation.comparison_plot import draw

    found = load_all(results, terminal.say)
    files, loaded = list(found), list(found.values())
    rows = comparison.compare(loaded, all_tasks=all_tasks)
    if as_json:
        click.echo(json.dumps(comparison.as_json(rows, files), indent=1))
    else:
        show(*table(loaded, files, all_tasks=all_tasks))
        if len(loaded) > 1:
            show("", *comparison.table(rows, loaded))
    if not as_json or out is not None:
        out = out or Path("compare.png")
        draw(rows, loaded, out, files)
        if not as_json:
            show(f"picture: {out}")
