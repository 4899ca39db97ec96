"""The body of every training recipe's main(): set the run up, train, and record how it ended."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from plmtune.config.compose import build
from plmtune.config.schema import TrainingConfig
from plmtune.config.typed_config import to_plain
from plmtune.errors import UserError, WeightsNotFinite
from plmtune.io import terminal
from plmtune.io.run_directory import RunDirectory, refuse_unusable
from plmtune.io.signals import EXIT_STOPPED
from plmtune.training import distributed
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.determinism import preserve_random_state
from plmtune.training.distributed import broadcast_from_rank0
from plmtune.training.init_from import (
    DEFAULT_INIT_RECIPES,
    check_init_changes,
    choose_init_checkpoint,
    pin_revisions,
)
from plmtune.training.machine import peak_flops
from plmtune.training.monitor import RunMonitor
from plmtune.training.preflight import TrainingPlan, find_sources, show_epochs
from plmtune.training.run_setup import find_run
from plmtune.training.runtime import Runtime
from plmtune.units import show_count


class Trainer(Protocol):
    """A recipe's class: an open run directory, and how to train in it."""

    run: RunDirectory
    checkpoints: Checkpoints

    def train(self) -> float | None: ...


C = TypeVar("C", bound=TrainingConfig)
Preflight = Callable[..., TrainingPlan]  # (cfg, runtime, *, fetch)
Make = Callable[[C, TrainingPlan, Runtime], Trainer]


def launch(
    cfg: C, preflight: Preflight, make: Make[C], report: Callable[[Path, C], None], *, dry_run: bool = False
) -> float | None:
    """Run a recipe; returns its score, which a sweeper can minimise.

    Args:
        cfg: the recipe's config; what it leaves to the initial checkpoint is filled in.
        preflight: checks the config, and finds all that it names.
        make: the recipe's class.
        report: prints the result of a finished run, on rank 0.
        dry_run: print the estimate, refuse what a run would refuse, and train nothing.

    Raises:
        SystemExit: with EXIT_STOPPED if a signal stopped it; it can be resumed.
    """
    runtime = _choose_runtime(cfg, planned=dry_run)
    if dry_run:
        if runtime.is_main:  # under torchrun one process prints for all
            plan = setup_run(cfg, runtime, preflight)
            _refuse_too_large(plan, force=cfg.force)
            terminal.echo("\n".join([*runtime.reasons, *plan.lines()]))
        return None
    with runtime.start():
        plan = setup_run(cfg, runtime, preflight, fetch=True)
        _refuse_too_large(plan, force=cfg.force)
        score = _run(cfg, make, report, plan, runtime)
    if score is None:
        raise SystemExit(EXIT_STOPPED)
    return score


def setup_run(
    cfg: TrainingConfig, runtime: Runtime, preflight: Preflight, *, fetch: bool = False, allow_missing: bool = False
) -> TrainingPlan:
    """Find what a run resumes or starts from, and check all that can be checked before a weight is allocated.

    Args:
        fetch: the run begins now: what it takes from the hub is fetched.
        allow_missing: if there is nothing to start from, check what does not depend on it.
    """
    find_run(cfg)
    find_sources(cfg.data)  # before a model is looked for, or fetched
    pin_revisions(cfg, weights=fetch)
    check_init_changes(cfg)
    inherits = cfg.init_from and (cfg.model is None or cfg.tokenizer is None)
    if (cfg.recipe in DEFAULT_INIT_RECIPES or inherits) and not cfg.resume:
        chosen = choose_init_checkpoint(cfg, allow_missing=allow_missing)
        if runtime.is_main:
            terminal.echo(chosen, err=True)
    if cfg.run_dir and not cfg.resume:
        path = Path(cfg.run_dir)
        broadcast_from_rank0(lambda: refuse_unusable(path))  # before it makes the directory
    return preflight(cfg, runtime, fetch=fetch)


def _choose_runtime(cfg: TrainingConfig, *, planned: bool) -> Runtime:
    of_the_model = ("compile", "activation_checkpointing")
    where = {key: value for key, value in vars(cfg.runtime).items() if key not in of_the_model}
    return Runtime.choose(**where, parallel=cfg.parallel, seed=cfg.seed, planned=planned)


def _refuse_too_large(plan: TrainingPlan, *, force: bool) -> None:
    if plan.estimated and (reason := plan.estimated.refusal()) and not force:
        raise UserError("\n".join([reason, *plan.lines()]))


def check(cfg: TrainingConfig, preflight: Preflight) -> str:
    """What ``plmtune validate`` prints about a valid config."""
    plan = setup_run(cfg, _choose_runtime(cfg, planned=True), preflight, allow_missing=True)
    steps = f"{plan.num_steps:,} steps" if plan.phases else show_epochs(plan.epochs or 0)
    if plan.estimated is None:
        return f"{steps[0].upper()}{steps[1:]} of the model that it starts from."
    fits = f" Not on this machine: {reason}." if (reason := plan.estimated.refusal()) else ""
    return f"{show_count(plan.estimated.parameters)} parameters, {steps}.{fits}"


def _run(
    cfg: C, make: Make[C], report: Callable[[Path, C], None], plan: TrainingPlan, runtime: Runtime
) -> float | None:
    """Train and report; None if a signal stopped it.

    A function of its own, so that the model's wrappers are gone before the process group is: DDP would otherwise
    end the group itself, under Python's lock, and wait for a thread that wants the lock.
    """
    recipe = make(cfg, plan, runtime)
    # However training ends, the directory's lock is held until the last file is written.
    with recipe.run, contextlib.closing(recipe.checkpoints), warnings.catch_warnings():
        # Where the guard skips the first update, torch takes the scheduler's step for calls in the wrong order.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        try:
            score = recipe.train()
        except WeightsNotFinite:
            recipe.run.note(ended_by="guard")  # a restart by torchrun must not undo it
            raise
        if score is None:
            recipe.run.finish("stopped")
        elif runtime.is_main:
            report(recipe.run.path, cfg)
    if score is None:
        distributed.barrier()  # torchrun ends the others when one leaves: rank 0 first records how the run stopped
    sys.stdout.flush()
    return score


def open_monitor(
    cfg: TrainingConfig, run: RunDirectory, runtime: Runtime, num_steps: int, start_step: int, **rates: Any
) -> RunMonitor:
    """Build the loggers of a config, and the monitor that writes to them, with `rates` for its speed and MFU."""
    # Built on rank 0 alone: some loggers begin a run of their own when they are made.
    wanted = cfg.logger and runtime.is_main
    built = build("logger", cfg.logger, directory=run.path, config=to_plain(cfg)) if wanted else []
    return RunMonitor(
        run,
        built if isinstance(built, list) else [built],
        num_steps,
        start_step,
        device=runtime.device,
        peak_flops=peak_flops(runtime.device, runtime.compute_dtype) * runtime.world_size,
        **rates,
    )


def warm_up(runtime: Runtime, step: Callable[[], object]) -> None:
    """Run DDP's first backward before the first step, by a forward and a backward that change no weight.

    It decides in which order later ones sum over ranks. A resumed run does its first backward here too, not in a step.
    """
    if runtime.strategy == "ddp":
        with preserve_random_state(runtime.device):
            step()
