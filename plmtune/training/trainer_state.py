"""Reading a checkpoint: the newest valid one of a run, and the training state that it holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from plmtune.errors import Unreadable, UserError
from plmtune.io import manifest
from plmtune.io.manifest import step_path, steps
from plmtune.models.checkpoint_files import Stored, locate, read_json
from plmtune.training import distributed
from plmtune.training import state as training_state

log = logging.getLogger(__name__)

STATE = "state.json"
# Some hundred bytes a parameter group and 20 KiB for each rank whose random numbers are its own.
_MAX_STATE_BYTES = 16 * 2**20


def latest_valid(directory: Path, *, once: bool = False) -> Path | None:
    """The newest checkpoint whose every file matches its manifest; None if there is no checkpoint.

    Rank 0 reads, and every rank gets its answer. Damaged ones are skipped, with a warning that names the file.

    Args:
        once: do not hash a file again that has not changed since it was found valid, see `manifest.check_files_once`.

    Raises:
        UserError: on every rank, if there are checkpoints and none is valid.
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
    """The state.json of a checkpoint; empty for a model without training state.

    Raises:
        UserError: if it is damaged.
    """
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
    def latest(cls, run_dir: str | Path) -> TrainerState:
        """Read the newest valid checkpoint of a run; empty if it has saved none. Every rank must call it.

        Raises:
            UserError: see `latest_valid`.
        """
        checkpoint = latest_valid(Path(run_dir) / "checkpoints")
        if checkpoint is None:
            return cls()
        document = read_trainer_state(checkpoint)
        return cls(checkpoint, document["step"], document["state"], document.get("metrics", {}))


def load_optimizer_state(directory: Path, *, model: nn.Module, optimizer: Optimizer) -> None:
    """Load another run's moments into a new optimizer, which keeps its own settings. Every rank must call it.

    Args:
        directory: a checkpoint that was verified.

    Raises:
        UserError: if that run's optimizer is another one.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    document = read_trainer_state(directory)
    try:
        moments = Stored(locate(directory, "optimizer"))
        training_state.load_optimizer_state_dict(model, optimizer, moments, document["optimizer"])
    except UserError as error:
        raise UserError(f"{directory} does not fit this run. {error}") from error
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
