"""From a config to a run that ended well, was stopped, or never began: what every recipe's main() does."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from plmtune import terminal
from plmtune.config import build, to_plain
from plmtune.errors import UserError
from plmtune.origins import KINDS, choose_origin
from plmtune.plans import Plan, check_numbers, plan, show_epochs
from plmtune.runs import find_run
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.determinism import everything_put_back
from plmtune.training.estimate import peak_flops
from plmtune.training.progress import Watch
from plmtune.training.run_directory import EXIT_STOPPED, RunDirectory
from plmtune.training.runtime import Runtime
from plmtune.units import show_count


class Recipe(Protocol):
    """What is made of a config, its plan and the runtime: an open run directory, and how to train in it."""

    run: RunDirectory
    checkpoints: Checkpoints

    def train(self) -> float | None: ...


def launch(
    cfg: Any,
    make: Callable[[Any, Plan, Runtime], Recipe],
    report: Callable[[Path, Any], None],
    *,
    dry_run: bool = False,
) -> float | None:
    """Run a recipe; returns its score, which a sweeper can minimise.

    Args:
        cfg: the recipe's config; what it leaves to the run's origin is filled in.
        make: the recipe.
        report: says on rank 0 how a finished run was.
        dry_run: print the estimate, and train nothing.

    Raises:
        SystemExit: with EXIT_STOPPED if a signal stopped it; it can be resumed.
    """
    with Runtime.start(
        device=cfg.runtime.device,
        precision=cfg.runtime.precision,
        strategy=cfg.runtime.strategy,
        shard_size=cfg.runtime.shard_size,
        seed=cfg.seed,
        deterministic=cfg.runtime.deterministic,
        timeout_minutes=cfg.runtime.timeout_minutes,
    ) as runtime:
        if not dry_run:
            find_run(cfg)
        if cfg.recipe in KINDS and not cfg.resume:
            chosen = choose_origin(cfg)
            if runtime.is_main:
                terminal.echo(chosen, err=True)
        planned = plan(cfg, runtime, dry=dry_run)
        if dry_run:
            terminal.echo("\n".join([*runtime.reasons, *planned.lines()]))
            return None
        if not planned.estimate.fits and not cfg.force:
            lines = "\n".join(planned.lines())
            raise UserError(f"this run does not fit here. To start it all the same: --force\n{lines}")
        score = _run(cfg, make, report, planned, runtime)
    if score is None:
        raise SystemExit(EXIT_STOPPED)
    return score


def _run(
    cfg: Any,
    make: Callable[[Any, Plan, Runtime], Recipe],
    report: Callable[[Path, Any], None],
    planned: Plan,
    runtime: Runtime,
) -> float | None:
    """Train and report; None if a signal stopped it.

    A function of its own, so that the model's wrappers are gone before the process group is: DDP would otherwise
    end the group itself, under Python's lock, and wait for a thread that wants the lock.
    """
    recipe = make(cfg, planned, runtime)
    # However training ends, the directory's lock is held until the last file is written.
    with recipe.run, contextlib.closing(recipe.checkpoints):
        score = recipe.train()
        if score is None:
            recipe.run.finish("stopped")
        elif runtime.is_main:
            report(recipe.run.path, cfg)
    if score is None:
        runtime.barrier()  # torchrun ends the others when one leaves: let the lead have written how the run stopped
    sys.stdout.flush()
    return score


def watch(recipe: Any, last: int, *, tokens_per_step: int | None = None, flops_per_token: float | None = None) -> Watch:
    """Watch a recipe's run up to step `last`."""
    cfg, runtime = recipe.cfg, recipe.runtime
    # Built on rank 0 alone: some begin a run of their own when they are made.
    wanted = cfg.logger and runtime.is_main
    built = build("logger", cfg.logger, directory=recipe.run.path, config=to_plain(cfg)) if wanted else []
    loggers = built if isinstance(built, list) else [built]
    return Watch(
        recipe.run,
        loggers,
        last,
        recipe.step,
        device=runtime.device,
        tokens_per_step=tokens_per_step,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops(runtime.device, runtime.compute_dtype) * runtime.world_size,
    )


def warm_up(runtime: Runtime, trial: Callable[[], object]) -> None:
    """Let DDP have its first backward before the first step.

    It decides in what order later ones add ranks up: a resumed run has its own first one here too, not in a step.
    """
    if runtime.strategy == "ddp":
        with everything_put_back(runtime.device):
            trial()


def check(cfg: Any) -> str:
    """What ``plmtune validate`` says of a config that is right."""
    with Runtime.start(device="cpu", seed=cfg.seed, timeout_minutes=cfg.runtime.timeout_minutes) as runtime:
        if cfg.model is None or cfg.tokenizer is None:
            check_numbers(cfg, runtime)
            return "Model and tokenizer are those of init_from."
        planned = plan(cfg, runtime, dry=True)
    steps = f", {planned.num_steps:,} steps" if planned.phases else ""
    if planned.epochs is not None:
        steps = f", {show_epochs(planned.epochs)}"
    return f"{show_count(planned.estimate.parameters)} parameters{steps}."
