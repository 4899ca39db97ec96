"""What every recipe does alike: the loop over steps, and the optimizer's update in it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from plmtune.errors import NotFinite, UserError
from plmtune.plans import Plan
from plmtune.training import guard
from plmtune.training.checkpoint import TOO_HIGH, Checkpoints
from plmtune.training.distributed import told_by_rank_0
from plmtune.training.guard import Guard
from plmtune.training.progress import Watch
from plmtune.training.run_directory import RunDirectory
from plmtune.training.runtime import Runtime


class Data(Protocol):
    """Batches by step, see `plmtune.data.batches.Batches`."""

    def iterate(self, start: int = 0) -> Generator[tuple[int, list[Any]], None, None]: ...

    def places(self, step: int, micro_batches: Any = None) -> list[str]: ...


class Recipe(Protocol):
    """What the loop asks of a recipe. `step` counts the whole run; `first` is the step before the data's first."""

    cfg: Any
    plan: Plan
    runtime: Runtime
    run: RunDirectory
    model: Any
    trained: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    checkpoints: Checkpoints
    guard: Guard
    step: int
    first: int
    losses: list[Tensor]

    @property
    def data(self) -> Any: ...

    def update(self, index: int, batches: list[Any]) -> dict[str, Any]: ...

    def validate(self) -> dict[str, float]: ...

    def save_checkpoint(self, metrics: dict[str, float], *, wait: bool) -> None: ...


def train(
    recipe: Recipe, watch: Watch, last: int, score: str = "validation_loss", value: float = float("nan")
) -> float | None:
    """Take steps up to `last`, with what belongs between them.

    Returns:
        The latest value of `score`, `value` if there is none, or None if stopped.
    """
    cfg, checkpoints = recipe.cfg, recipe.checkpoints
    recipe.run.update(num_steps=last, parameters=recipe.plan.estimate.parameters)  # for plmtune runs
    noted = checkpoints.saved
    # A run that was stopped while it measured its tasks goes on with them.
    evaluations = recipe.plan.evaluations
    if evaluations and not evaluations.is_done(recipe.run.path, recipe.step):
        evaluated = _evaluate(recipe, watch, last)
        if watch.failure:
            raise UserError(watch.failure)
        if not evaluated:
            _say_stopped(recipe, watch)
            return None
    for index, batches in recipe.data.iterate(recipe.step - recipe.first):
        entry = recipe.update(index, batches)
        recipe.step = recipe.first + index + 1
        ended, measured = recipe.step == last, {}
        if ended or recipe.step % cfg.log_every == 0 or recipe.guard.reason:
            watch.log(recipe.step, entry)
        if ended or recipe.guard.reason:
            _check_weights(recipe)
        if recipe.guard.reason:
            _pass_over(recipe, watch, index)
        if ended or (cfg.validation.every and recipe.step % cfg.validation.every == 0):
            with watch.paused():
                measured = recipe.validate()
            if measured:
                value = measured.get(score, value)
                watch.log(recipe.step, measured)
        scored = _evaluate(recipe, watch, last)
        stop = watch.should_stop()
        if ended or stop or (cfg.checkpoint.every and recipe.step % cfg.checkpoint.every == 0):
            with watch.paused():
                recipe.save_checkpoint(measured, wait=ended or stop)
        else:
            _mind_saves(recipe, watch)
        if checkpoints.saved > noted:
            noted = checkpoints.saved
            recipe.run.note(saved=noted)  # should the checkpoints be gone one day, a resume can tell
        if watch.failure:
            raise UserError(watch.failure)
        if stop and not (ended and scored):
            _say_stopped(recipe, watch)
            return None
    return value


def _say_stopped(recipe: Recipe, watch: Watch) -> None:
    watch.message(f"stopped after step {recipe.step}; resume with: plmtune resume {recipe.run.path}")


def update(recipe: Recipe, batches: Sequence[Any], count: float, loss: Callable[[Any], Tensor]) -> dict[str, Any]:
    """One optimizer step on this rank's micro-batches of a global batch, or none, if the guard refuses it.

    Args:
        count: what the summed loss is divided by, of this rank: valid tokens, or pairs. Not micro-batches: they
            differ in what they hold.
        loss: summed, of one micro-batch on the device.

    Returns:
        loss, grad_norm and learning rates of the step.
    """
    runtime = recipe.runtime
    lrs = rates(recipe.optimizer)
    (num,) = runtime.sum(count)
    recipe.losses = []
    for number, batch in enumerate(batches):
        with runtime.accumulate(recipe.trained, first=number == 0, last=number == len(batches) - 1):
            value = loss(batch.to(runtime.device))
            (value * (runtime.gradient_scale / num)).backward()
        recipe.losses.append(value.detach())
    norm = runtime.clip_grad_norm(recipe.model, recipe.cfg.max_grad_norm)
    # The only wait for the device; all ranks get the same numbers, and decide alike.
    total, norms = runtime.sum(torch.stack(recipe.losses).sum(), norm)
    values = {"loss": total / num, "grad_norm": norms / runtime.world_size}
    accepted = recipe.guard.accepts(values["loss"], values["grad_norm"])
    guard.step(recipe.optimizer, recipe.scheduler, accepted=accepted)
    if not accepted:
        values["skipped"] = recipe.guard.skipped
    return {**values, **lrs}


def rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rates of the next step: `lr` of the first group, `lr/NAME` of each other named one.

    A group without a name is logged by its index where its rate differs from the first's.
    """
    found: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        rate = float(group["lr"])  # torchao's is a tensor that the scheduler changes in place
        if index == 0:
            found["lr"] = rate
        elif "name" in group or rate != found["lr"]:
            found[f"lr/{group.get('name', index)}"] = rate
    return found


def _evaluate(recipe: Recipe, watch: Watch, last: int) -> bool:
    """Measure the tasks of `eval.tasks` where they are due and not yet measured; False if asked to stop meanwhile."""
    evaluations, step, every = recipe.plan.evaluations, recipe.step, recipe.cfg.eval.every
    if evaluations is None or not (step == last or (every and step and step % every == 0)):
        return True
    with watch.paused():
        measured = evaluations.measure(recipe.model, recipe.runtime, recipe.run.path, step, watch)
    if measured:
        watch.log(step, measured)
    return measured is not None


def _check_weights(recipe: Recipe) -> None:
    """End the run where an update has made weights of no use: no later one can mend them."""
    since = recipe.step - 1 if recipe.guard.reason else recipe.step

    def message(names: str) -> str:
        kept = told_by_rank_0(recipe.checkpoints.describe_newest)
        return (
            f"step {recipe.step}: weights are not finite since the update of step {since} ({names}), so they are not "
            f"saved. {kept} {TOO_HIGH}"
        )

    try:
        guard.check_weights(dict(recipe.model.named_parameters()), message)
    except NotFinite:
        recipe.run.note(ended_by="guard")  # which no restart by torchrun may undo
        raise


def _pass_over(recipe: Recipe, watch: Watch, index: int) -> None:
    """Tell of an update that was skipped; after too many in a row, end the run."""
    watch.message(f"step {recipe.step}: update skipped, because {recipe.guard.reason}")
    if recipe.guard.exhausted:
        places = guard.find_places(recipe.losses, lambda chosen: recipe.data.places(index, chosen))
        error = recipe.guard.stop(recipe.step, places)
        recipe.guard.reset_consecutive()  # a resumed run has the whole patience
        recipe.save_checkpoint({}, wait=True)  # of the last good update; a resumed run starts after this step
        recipe.run.note(ended_by="guard")  # which no restart by torchrun may undo
        raise error


def _mind_saves(recipe: Recipe, watch: Watch) -> None:
    """See how the save in the background does; where it failed, try once more to keep what there is."""
    try:
        recipe.checkpoints.poll()
    except NotFinite:
        recipe.run.note(ended_by="guard")
        raise
    except UserError as error:
        watch.message(f"{error}\nTrying once more, with the present state.")
        recipe.save_checkpoint({}, wait=True)
