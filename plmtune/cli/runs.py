"""``plmtune runs``: which runs there are, how it stands with each, and how they compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from plmtune.cli.options import PATH, check_output, option, print_json_option
from plmtune.cli.runs_table import reasons, table
from plmtune.errors import UserError
from plmtune.io.run_comparison import Score, keep, read_rows, set_score, sort, write_csv
from plmtune.io.run_summary import Summary, find_runs
from plmtune.io.tables import show
from plmtune.launch.queue import queue_states
from plmtune.launch.record import find_launches, read_launch


@click.command()
@click.argument("directories", nargs=-1, type=PATH, metavar="[DIR]...")
@option("--filter TEXT", "List runs for which KEY=VALUE, KEY!=VALUE, KEY>VALUE holds. Can be given several times.",
        "filters", multiple=True)  # fmt: skip
@option("--sort TEXT", "Sort by KEY or KEY:desc.", "sort_by")
@option("--score TEXT", "Compare by this metric, KEY, KEY:min or KEY:max (default: validation_loss).")
@option("--device TEXT", "Predict tokens/s on this device, a name or FILE.yaml (default with --plot: pi5).")
@option("--scheme TEXT", "Predict for this scheme.", default="int4")
@option("--context N", "Predict at N tokens in the cache (default: 2048, or what the models take).")
@option("--csv FILE.csv", "Write a line for each run with all keys that differ.", "csv_path")
@option("--plot FILE.png", "Draw the score against the predicted speed with the Pareto front.")
@print_json_option
def runs(
    directories: tuple[Path, ...],
    filters: tuple[str, ...],
    sort_by: str | None,
    score: str | None,
    device: str | None,
    scheme: str,
    context: int | None,
    csv_path: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """List the runs in each DIR (default: runs), the oldest first.

    A failed run is listed with its reason. A run has the status "killed" if it recorded no end and its process is gone.
    The column "step" holds the last logged step. "saved step" is the step of the newest checkpoint: resume continues
    from it, and other commands read it. "queue" is how the job of plmtune launch slurm stands, as squeue and sacct say.

    With --score, --device, --csv or --plot the runs are compared: the keys that differ are columns, and Spearman's rank
    correlation of each with the score is printed, of finished runs. A KEY is one of a config (model.num_layers), of
    metrics.jsonl (bits_per_byte), or status, recipe, layers, width, ffn_ratio, parameters, tokens, seconds, score or
    speed, the predicted tokens/s.

    \b
    plmtune runs
    plmtune runs runs/pretrain --json
    plmtune runs runs/multirun --score bits_per_byte --sort score --filter status=finished
    plmtune runs runs/multirun --device pi5 --plot shapes.png --csv shapes.csv
    """
    check_output(csv_path, ".csv")
    check_output(plot, ".png")
    source = click.get_current_context().get_parameter_source("scheme")
    if device is None and plot is None:
        for flag, given in (("--scheme", source is not None and source.name != "DEFAULT"), ("--context", context)):
            if given:
                raise UserError(f"{flag} counts with --device.")
    paths: dict[Path, Path] = {}
    for directory in directories or (Path("runs"),):
        if not directory.is_dir():
            raise UserError(f"There is no directory {directory}. Runs are in runs/, where plmtune run was called.")
        paths |= {path.resolve(): path for path in find_runs(directory) if path.resolve() not in paths}
    compares = any(one is not None for one in (score, device, csv_path, plot))
    waiting = [] if compares or filters or sort_by else _waiting(directories or (Path("runs"),), [*paths.values()])
    if not paths and not waiting:
        where = ", ".join(map(str, directories or ("runs",)))
        raise UserError(f"There are no runs in {where}. Start one: plmtune run pretrain")
    rows = read_rows([*paths.values()])
    wanted = Score.parse(score or "validation_loss")
    if compares and (score is not None or any(wanted.key in row.values for row in rows)):
        set_score(rows, wanted)
    speeds = None
    if device is not None or plot is not None:
        from plmtune.cli.runs_comparison import set_speeds

        speeds = set_speeds(rows, device or "pi5", scheme, context)
    for text in filters:
        rows = keep(rows, text)
    if filters and not rows:
        raise UserError(f"--filter: it holds for none of {len(paths):,} runs.")
    rows = sort(rows, sort_by) if sort_by else rows
    found = [row.summary for row in rows]
    if not compares:
        found += waiting
        _set_queue(found)
        if as_json:
            click.echo(json.dumps([asdict(one) for one in found], indent=1))
        else:
            show(table(found), *reasons(found))
        return

    from plmtune.cli.runs_comparison import as_json as as_plain
    from plmtune.cli.runs_comparison import show_comparison
    from plmtune.io.run_plot import draw_runs, drawn

    if plot is not None and not drawn(rows):
        raise UserError(f"--plot: no run is finished and has {wanted.key} and a predicted speed.")
    if as_json:
        click.echo(json.dumps(as_plain(rows, wanted, speeds), indent=1, allow_nan=False))
    else:
        show_comparison(rows, wanted, speeds)
        show(*reasons(found))
    if csv_path is not None:
        write_csv(rows, csv_path, wanted)
    if plot is not None and speeds is not None:
        draw_runs(rows, wanted, plot, speeds.how, bound=speeds.bound)
    if not as_json:
        for path in filter(None, (csv_path, plot)):
            show(f"{path} written")


def _waiting(directories: Sequence[Path], known: Sequence[Path]) -> list[Summary]:
    """Launches whose runs have not begun: their jobs are queued, or ended before."""
    paths = {path.resolve(): path for directory in directories for path in find_launches(directory, known)}
    return [Summary(str(path), status="not begun") for path in paths.values()]


def _set_queue(found: Sequence[Summary]) -> None:
    """Ask how the jobs of launched runs stand. A finished run is not asked for."""
    launches = {}
    for one in found:
        launch = read_launch(Path(one.path))
        if launch is not None and launch.backend != "local" and one.status != "finished":
            launches[Path(one.path)] = launch
    states = queue_states(launches)
    for one in found:
        one.queue = states.get(Path(one.path))
        if one.queue and ": running" in one.queue and one.status == "killed":
            one.status = "running"  # on another machine, whose lock is not seen here
