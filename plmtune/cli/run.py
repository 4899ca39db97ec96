"""``plmtune run`` and ``plmtune resume``: from a name and overrides to a recipe's main()."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from plmtune.cli import short
from plmtune.cli.options import divide, import_option, option, recipe_file, without_collecting
from plmtune.cli.runs_table import reasons, table
from plmtune.errors import UserError, either, near_names
from plmtune.io import terminal
from plmtune.io.run_directory import (
    CONFIG,
    read_record,
    refuse_if_in_use,
    resolve_link,
    resume_command,
    started_recipe,
    verify_config,
)
from plmtune.io.run_summary import already_finished, differing_settings, find_runs, summarize, unfinished
from plmtune.io.tables import show


@click.command()
@click.argument("name")
@click.argument("arguments", nargs=-1, metavar="[FILE.yaml] [KEY=VALUE]...")
@option("--multirun", "Run every combination of comma-separated values.", "-m")
@option("--dry-run", "Build on the meta device and print the estimate; train nothing.")
@option("--force", "Start even if the estimate does not fit into memory.")
@option("--sensitivity", "Measure each module's loss from quantization and choose a mix (quantize).")
@import_option
def run(name: str, arguments: tuple[str, ...], multirun: bool, dry_run: bool, force: bool, sensitivity: bool) -> None:
    """Run NAME: a config (plmtune ls), your own recipe.py, or a YAML file.

    \b
    plmtune run demo
    plmtune run pretrain data.paths=my_text/ phases='[{name: main, tokens: 2B}]'
    plmtune run sft data.paths=chats.jsonl epochs=2
    plmtune run pretrain conf/plm_1.8b.yaml model/ffn=swiglu --dry-run
    plmtune run -m demo optimizer.lr=3e-3,1e-2       check every job, then run all
    """
    overlays, overrides = divide(arguments)
    overrides += ["sensitivity.measure=true"] if sensitivity else []
    for text in overrides:  # checked before the import of torch, which takes longer
        if text.startswith("run_dir=") and not (multirun or dry_run):
            _refuse_early(Path(text.removeprefix("run_dir=").strip("'\"")))
    with without_collecting():
        module = recipe_file(name) if name.endswith(".py") else None

        from plmtune.config.compose import compose
        from plmtune.config.compose import multirun as run_all

    base = module.CONFIG if module else name
    jobs: list[Path] = []

    def start(cfg: Any, checks: bool = False) -> Any:
        cfg.force = cfg.force or force
        with without_collecting():
            recipe = module or importlib.import_module(f"plmtune.recipes.{cfg.recipe}")
            if dry_run or checks:
                if "dry_run" in inspect.signature(recipe.main).parameters:
                    return recipe.main(cfg, dry_run=True)
                if dry_run:
                    raise UserError(f"{name}: --dry-run needs a recipe with def main(cfg, *, dry_run=False).")
                return None
        jobs.extend([Path(cfg.run_dir)] if cfg.run_dir else [])
        # The score is for a sweeper; a recipe that was stopped raises SystemExit(75) instead.
        return recipe.main(cfg)

    def check_only(cfg: Any) -> None:
        unsaid = io.StringIO()
        with contextlib.redirect_stdout(unsaid), contextlib.redirect_stderr(unsaid):
            start(cfg, checks=True)

    if multirun:
        directory = Path("runs") / "multirun" / f"{datetime.now():%Y%m%d-%H%M%S}"
        if not dry_run and not any(text.startswith("hydra/") for text in overrides):  # others draw jobs as they run
            run_all(base, overlays, overrides, check_only, directory)
        try:
            run_all(base, overlays, overrides, start, directory)
        finally:  # also where a job failed: the others have run
            # A launcher may run jobs in other processes, and hydra.sweep.dir may be another directory.
            places = dict.fromkeys(path.resolve() for path in [*jobs, *find_runs(directory)])
            paths = [Path(short(path)) for path in places if (path / CONFIG).is_file()]
            if paths:
                found = [summarize(path) for path in paths]
                show(table(found, differing_settings(paths)), *reasons(found))
    else:
        with without_collecting():
            cfg = compose(base, overlays, overrides)
        start(cfg)


@click.command()
@click.argument("arguments", nargs=-1, metavar="[RUN_DIR] [KEY=VALUE]...")
@option("--allow-data-change", "Resume even if the data has changed since the run began.")
@option("--recipe FILE.py", "Use this recipe file, for a run of your own recipe.", "recipe_path", type=str)
@import_option
def resume(arguments: tuple[str, ...], allow_data_change: bool, recipe_path: str | None) -> None:
    """Resume the run in RUN_DIR from its newest intact checkpoint, with the config saved there.

    Without RUN_DIR, resume the newest run under runs/ that is not finished. Relative paths in its config are those of
    the directory in which it began.

    Keys that change where or how it computes, not what it learns, may be changed for this attempt: runtime,
    micro_batch_size, num_workers, checkpoint, guard, validation, eval, logger, log_every, sample.

    \b
    plmtune resume
    plmtune resume runs/demo/newest
    plmtune resume runs/demo/newest micro_batch_size=2 checkpoint.every=100
    """
    named = arguments[:1] if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_dir()) else ()
    overrides = arguments[len(named) :]
    run_dir = resolve_link(Path(named[0])) if named else _newest_unfinished()
    path = run_dir / CONFIG
    if not path.is_file():
        known = [str(path) for path in find_runs(Path("runs"))]
        hint = "List the runs with plmtune runs" if known else "There are no runs under runs/."
        if near := near_names(str(run_dir), known):
            hint = f"Did you mean {either(near)}?"
        raise UserError(f"{run_dir} is not a run directory: it has no {CONFIG}. {hint}")
    _refuse_early(run_dir)
    verify_config(run_dir)
    record = read_record(run_dir)
    if record.get("status") == "finished":
        terminal.echo(already_finished(run_dir))
        return
    used = started_recipe(record)
    if used and not recipe_path:
        raise UserError(f"{run_dir} ran the recipe {used}. Resume it with: {resume_command(run_dir)}")

    from plmtune.config.typed_config import load_config, override
    from plmtune.training.resume_checks import refuse_other_config

    module = recipe_file(recipe_path) if recipe_path else None  # it may have a schema of its own
    saved = load_config(path)
    cfg = override(saved, overrides)
    for key in ("run_dir", "resume", "init_from"):
        if hasattr(cfg, key) and getattr(cfg, key) != getattr(saved, key):
            raise UserError(f"key {key}: says where a run begins, and this one has begun: it cannot change on resume.")
    cfg.allow_data_change = cfg.allow_data_change or allow_data_change
    refuse_other_config(run_dir, saved, cfg)
    recipe = module or importlib.import_module(f"plmtune.recipes.{cfg.recipe}")
    cfg.run_dir, cfg.resume = str(_go_to_its_directory(run_dir, saved.run_dir, record)), True
    recipe.main(cfg)


def _newest_unfinished() -> Path:
    if os.environ.get("WORLD_SIZE", "1") != "1":  # each process would look at another moment
        raise UserError("Name the run to resume: plmtune resume RUN_DIR. Several processes cannot look for it.")
    found = next(unfinished(), None)
    if found is None:
        raise UserError("There is no unfinished run under runs/ to resume. List the runs with plmtune runs")
    terminal.say(f"resuming {found}")
    return found


def _go_to_its_directory(run_dir: Path, began_as: str | None, record: dict[str, Any]) -> Path:
    """Make the directory in which a run began the working directory, for the relative paths in its config.

    One that was moved or copied with all that is around it stays here. Returns the run's directory as seen from there.
    """
    there = record.get("directory")
    same_place = began_as and not Path(began_as).is_absolute() and Path(began_as).resolve() == run_dir.resolve()
    if same_place or not isinstance(there, str) or not Path(there).is_dir() or Path(there).resolve() == Path.cwd():
        return run_dir
    terminal.say(f"relative paths in {run_dir / CONFIG} are seen from {there}, where the run began")
    run_dir = run_dir.resolve()
    os.chdir(there)
    return run_dir


def _refuse_early(run_dir: Path) -> None:
    """Refuse a directory in which another process runs, long before the lock is taken."""
    if os.environ.get("RANK", "0") == "0":  # the others would see the lock of rank 0
        refuse_if_in_use(run_dir)
