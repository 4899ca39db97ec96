"""Which checkpoints a run keeps (the newest, the best, a pinned one), and what a kill left unfinished."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from plmtune.config.renamed import metric_value
from plmtune.config.schema import CheckpointConfig, ValidationConfig
from plmtune.errors import Unreadable, UserError
from plmtune.io import manifest
from plmtune.io.manifest import step_path, steps
from plmtune.training.trainer_state import STATE, read_trainer_state

log = logging.getLogger(__name__)

BEST = "best"
_UNFINISHED = re.compile(r"\.(?:tmp-step-|old-step-|latest\.tmp-|best\.tmp-)")


def prune(directory: Path, kept: Collection[int], best: int | None) -> None:
    """Remove the checkpoints that are not kept, and name the best one in the file `BEST`.

    Args:
        kept: steps to keep.
        best: the step with the best metric, which is kept as well; None: there is none.
    """
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
        name = path.name.removeprefix(".old-")
        if path.name.startswith(".old-") and not (directory / name).exists():
            _restore_renamed(path, directory / name)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _restore_renamed(moved: Path, name: Path) -> None:
    """Give a checkpoint its name back, unless it is damaged."""
    try:
        manifest.check_files(moved)
        moved.rename(name)
    except Unreadable:
        log.warning("%s cannot be read, and is left as it is.", moved)
    except UserError:
        shutil.rmtree(moved, ignore_errors=True)


def best_checkpoint_notes(settings: CheckpointConfig, validation: ValidationConfig) -> list[str]:
    """A line to print where a run saves at steps that it does not validate."""
    save, validate = settings.every, validation.every
    if not (settings.best and save and validate and save % validate):
        return []
    return [
        f"best checkpoint: only steps that are measured and saved count, each {math.lcm(save, validate)}th; "
        "set checkpoint.every to a multiple of validation.every"
    ]
