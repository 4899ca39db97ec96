"""The checkpoints of a run: the newest valid one and its training state, the best one, and which are kept."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from plmtune.config.renamed import metric_value
from plmtune.config.schema import RunConfig
from plmtune.config.sections import CheckpointConfig, ValidationConfig
from plmtune.errors import Unreadable, UserError
from plmtune.io import manifest
from plmtune.io.manifest import step_path, steps
from plmtune.models.checkpoint_files import Stored, locate, read_json
from plmtune.training import distributed
from plmtune.training import state as training_state

log = logging.getLogger(__name__)

STATE = "state.json"
BEST = "best"
# Some hundred bytes a parameter group and 20 KiB for each rank whose random numbers are its own.
_MAX_STATE_BYTES = 16 * 2**20
_UNFINISHED = re.compile(r"\.(?:tmp-step-|old-step-|latest\.tmp-|best\.tmp-)")


def latest_valid(directory: Path, *, once: bool = False) -> Path | None:
    """The newest checkpoint whose every file matches its manifest; None if there is no checkpoint.

    Rank 0 reads, and every rank gets its answer. Damaged ones are skipped, with a warning that names the file; if none
    is valid, every rank raises UserError.

    Args:
        once: do not hash a file again that has not changed since it was found valid, see `manifest.check_files_once`.
    """

    def find() -> str:
        refused: list[str] = []
        for step in reversed(steps(directory)):
            path = step_path(directory, step)
            try:
                if once:
                    manifest.read(path)  # it must have one
                    manifest.check_files_once(path)
                else:
                    manifest.check_files(path)
            except Unreadable:
                raise  # it may be valid, and its steps would be lost
            except UserError as error:
                log.warning("Checkpoint refused: %s", error)
                refused.append(str(error))
                continue
            if refused:
                log.warning("Resuming from %s instead.", path)
            return path.name
        if refused:
            raise UserError(
                f"No checkpoint in {directory} is valid: {' '.join(refused)} Put a valid copy back, or start a new run."
            )
        if directory.is_symlink() and not directory.exists():
            raise UserError(f"{directory} leads to {directory.readlink()}, which is not there. Is its disk mounted?")
        return ""

    found = distributed.broadcast_from_rank0(find)
    return directory / found if found else None


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """The state.json of a checkpoint; empty for a model without training state."""
    if not (directory / STATE).exists():
        return {}
    document = read_json(directory, STATE, max_bytes=_MAX_STATE_BYTES)
    if not isinstance(document.get("state"), dict) or not isinstance(document.get("step"), int):
        raise UserError(f"{directory / STATE} is damaged: it lacks step or state. Use an earlier checkpoint.")
    return document


@dataclass(frozen=True)
class TrainerState:
    """What the checkpoint that a run resumes from holds besides tensors; a new run has an empty one.

    Attributes:
        checkpoint: its directory.
        step: optimizer steps that were made.
        state: what the recipe saved, see `Checkpoints.save`.
        metrics: what was measured at that step.
    """

    checkpoint: Path | None = None
    step: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg: RunConfig) -> TrainerState:
        """Read the `latest_valid` checkpoint of the run that `cfg` resumes, if it has one. Every rank must call it."""
        checkpoint = latest_valid(Path(str(cfg.run_dir)) / "checkpoints") if cfg.resume else None
        if checkpoint is None:
            return cls()
        document = read_trainer_state(checkpoint)
        return cls(checkpoint, document["step"], document["state"], document.get("metrics", {}))


def load_optimizer_state(directory: Path, *, model: nn.Module, optimizer: Optimizer) -> None:
    """Load another run's moments into a new optimizer, which keeps its own settings. Every rank must call it."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    document = read_trainer_state(directory)
    try:
        moments = Stored(locate(directory, "optimizer"))
        training_state.load_optimizer_state_dict(model, optimizer, moments, document["optimizer"])
    except UserError as error:
        raise UserError(f"{directory} does not fit this run. {error}") from error
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def prune(directory: Path, kept: Collection[int], best: int | None) -> None:
    """Remove the checkpoints of other steps than `kept` and `best`, if there is one; the file `BEST` names it."""
    if best is None:
        (directory / BEST).unlink(missing_ok=True)
    else:
        manifest.write_text(directory / BEST, f"{step_path(directory, best).name}\n")
    for step in steps(directory):
        if step not in kept and step != best:
            path = step_path(directory, step)
            # Renamed first: a kill in the middle of the removal must not leave half of it under its name.
            path.rename(directory / f".old-{path.name}")
    for path in directory.glob(".old-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def best_step(directory: Path, among: Sequence[int], metric: str | None, mode: Literal["min", "max"]) -> int | None:
    """The step with the best value of a metric; of equal ones the newest. None if no step has a finite value."""
    values = {step: _metric(step_path(directory, step), metric) for step in among} if metric else {}
    sign = -1 if mode == "min" else 1
    ranked = [(sign * v, step) for step, v in values.items() if isinstance(v, int | float) and math.isfinite(v)]
    return max(ranked)[1] if ranked else None


def _metric(path: Path, name: str | None) -> Any:
    """The value of a metric in the checkpoint at `path`; None if its state is damaged."""
    try:
        valid = manifest.read(path)["files"][STATE]["xxh3_128"] == manifest.digest(path / STATE)
        return metric_value(read_trainer_state(path)["metrics"], name) if valid and name else None
    except (UserError, LookupError, TypeError, AttributeError, OSError):
        return None


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed process left behind, and undo a replacement that it did not finish."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if not _UNFINISHED.match(path.name):
            continue
        original = directory / path.name.removeprefix(".old-")
        try:
            if path.name.startswith(".old-") and not original.exists():
                manifest.check_files(path)
                path.rename(original)
                continue
        except Unreadable:
            log.warning("%s cannot be read, and is left as it is.", path)
            continue
        except UserError:
            pass  # damaged
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def best_checkpoint_notes(settings: CheckpointConfig, validation: ValidationConfig) -> list[str]:
    """A line to print where a run saves at steps that it does not validate."""
    save, validate = settings.every, validation.every
    if not (settings.best and save and validate and save % validate):
        return []
    return [
        f"best checkpoint: only steps that are measured and saved count, each {math.lcm(save, validate)}th; "
        "set checkpoint.every to a multiple of validation.every"
    ]
