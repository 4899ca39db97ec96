"""From a config to a run that ended well, was stopped, or never began: what every recipe's main() does."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from plmtune.config.compose import build, to_plain
from plmtune.errors import NotFinite, UserError
from plmtune.io import terminal
from plmtune.io.run_directory import RunDirectory, refuse_unusable
from plmtune.io.signals import EXIT_STOPPED
from plmtune.training import plans
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.determinism import preserve_random_state
from plmtune.training.distributed import broadcast_from_rank0
from plmtune.training.estimate import peak_flops
from plmtune.training.init_from import DEFAULT_INIT_RECIPES, choose_init_checkpoint, pin_revisions
from plmtune.training.monitor import RunMonitor
from plmtune.training.plans import Plan, does_not_fit, show_epochs
from plmtune.training.run_setup import find_run
from plmtune.training.runtime import Runtime
from plmtune.units import show_count


class Recipe(Protocol):
    """What is made of a config, its plan and the runtime: an open run directory, and how to train in it."""

    run: RunDirectory
    checkpoints: Checkpoints

    def train(self) -> float | None: ...


Preflight = Callable[..., Plan]  # (cfg, runtime, *, fetch): a recipe's plan, with all that it names checked


def launch(
    cfg: Any,
    preflight: Preflight,
    make: Callable[[Any, Plan, Runtime], Recipe],
    report: Callable[[Path, Any], None],
    *,
    dry_run: bool = False,
) -> float | None:
    """Run a recipe; returns its score, which a sweeper can minimise.

    Args:
        cfg: the recipe's config; what it leaves to the run's origin is filled in.
        preflight: checks the config, and finds all that it names.
        make: the recipe.
        report: says on rank 0 how a finished run was.
        dry_run: print the estimate, refuse what a run would refuse, and train nothing.

    Raises:
        SystemExit: with EXIT_STOPPED if a signal stopped it; it can be resumed.
    """
    if dry_run:
        _dry_run(cfg, preflight)
        return None
    with Runtime.choose(**_settings(cfg)).start() as runtime:
        planned = prepare(cfg, runtime, preflight, fetch=True)
        _refuse_too_large(cfg, planned)
        score = _run(cfg, make, report, planned, runtime)
    if score is None:
        raise SystemExit(EXIT_STOPPED)
    return score


def prepare(
    cfg: Any,
    runtime: Runtime,
    preflight: Preflight,
    *,
    fetch: bool = False,
    allow_missing: bool = False,
) -> Plan:
    """Find what a run resumes or starts from, and check all that can be checked before a weight is allocated.

    Args:
        fetch: the run begins now: what it takes from the hub is fetched.
        allow_missing: where there is nothing to start from, check what does not depend on it.

    Raises:
        UserError: with what a run would say; a dry run and ``plmtune validate`` say the same.
    """
    find_run(cfg)
    plans.find_sources(cfg.data)  # before a model is looked for, or fetched
    pin_revisions(cfg, weights=fetch)
    if cfg.recipe in DEFAULT_INIT_RECIPES and not cfg.resume:
        chosen = choose_init_checkpoint(cfg, allow_missing=allow_missing)
        if runtime.is_main:
            terminal.echo(chosen, err=True)
    if cfg.run_dir and not cfg.resume:
        broadcast_from_rank0(lambda: refuse_unusable(Path(cfg.run_dir)))  # before it makes the directory
    return preflight(cfg, runtime, fetch=fetch)


def _settings(cfg: Any) -> dict[str, Any]:
    names = ("device", "precision", "strategy", "shard_size", "deterministic", "timeout_minutes")
    return {"seed": cfg.seed, **{name: getattr(cfg.runtime, name) for name in names}}


def _dry_run(cfg: Any, preflight: Preflight) -> None:
    """Print what a run would take, or refuse what it would refuse."""
    runtime = Runtime.choose(**_settings(cfg))
    if not runtime.is_main:  # under torchrun one process says it for all
        return
    planned = prepare(cfg, runtime, preflight)
    _refuse_too_large(cfg, planned)
    terminal.echo("\n".join([*runtime.reasons, *planned.lines()]))


def _refuse_too_large(cfg: Any, planned: Plan) -> None:
    if (reason := does_not_fit(planned.estimated)) and not cfg.force:
        raise UserError("\n".join([reason, *planned.lines()]))


def check(cfg: Any, preflight: Preflight) -> str:
    """What ``plmtune validate`` says of a config that is right."""
    planned = prepare(cfg, Runtime.choose(**_settings(cfg)), preflight, allow_missing=True)
    steps = f"{planned.num_steps:,} steps" if planned.phases else show_epochs(planned.epochs or 0)
    if planned.estimated is None:
        return f"{steps[0].upper()}{steps[1:]} of the model that it starts from."
    fits = f" Not on this machine: {reason}." if (reason := does_not_fit(planned.estimated)) else ""
    return f"{show_count(planned.estimate.parameters)} parameters, {steps}.{fits}"


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
    with recipe.run, contextlib.closing(recipe.checkpoints), warnings.catch_warnings():
        # Where the guard skips the first update, torch takes the scheduler's step for calls in the wrong order.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        try:
            score = recipe.train()
        except NotFinite:
            recipe.run.note(ended_by="guard")  # a restart by torchrun must not undo it
            raise
        if score is None:
            recipe.run.finish("stopped")
        elif runtime.is_main:
            report(recipe.run.path, cfg)
    if score is None:
        runtime.barrier()  # torchrun ends the others when one leaves: let the lead have written how the run stopped
    sys.stdout.flush()
    return score


def open_monitor(
    cfg: Any,
    run: RunDirectory,
    runtime: Runtime,
    num_steps: int,
    start_step: int,
    *,
    tokens_per_step: int | None = None,
    flops_per_token: float | None = None,
) -> RunMonitor:
    """Build the loggers of a config, and the monitor that writes to them.

    Args:
        cfg: a recipe's config.
        num_steps, start_step, tokens_per_step, flops_per_token: see `RunMonitor`.
    """
    # Built on rank 0 alone: some loggers begin a run of their own when they are made.
    wanted = cfg.logger and runtime.is_main
    built = build("logger", cfg.logger, directory=run.path, config=to_plain(cfg)) if wanted else []
    return RunMonitor(
        run,
        built if isinstance(built, list) else [built],
        num_steps,
        start_step,
        device=runtime.device,
        tokens_per_step=tokens_per_step,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops(runtime.device, runtime.compute_dtype) * runtime.world_size,
    )


def warm_up(runtime: Runtime, step: Callable[[], object]) -> None:
    """Run DDP's first backward before the first step.

    It decides in which order later ones sum over ranks. A resumed run does its first backward here too, not in a step.

    Args:
        step: a forward and a backward that change no weight.
    """
    if runtime.strategy == "ddp":
        with preserve_random_state(runtime.device):
            step()
