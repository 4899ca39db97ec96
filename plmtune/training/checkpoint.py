"""Checkpoints: directories that are whole or not there, and from which training goes on byte for byte.

The protocol: write into ``.tmp-step-00000500-<pid>``, bring every file to the disk, write ``manifest.json``
last, rename once to ``step-00000500``, then replace ``latest``. A process killed anywhere leaves the previous
checkpoint as it was. See docs/checkpoints.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from plmtune.errors import UserError
from plmtune.training import distributed, manifest
from plmtune.training import state as training_state

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.(?:(?:tmp|old)-step-\d+-|latest\.tmp-)(\d+)")


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def read_state_json(directory: Path) -> dict[str, Any]:
    """What the recipe saved beside the weights of a checkpoint; empty for a model without training state."""
    if not (directory / STATE).is_file() or not (directory / OPTIMIZER).is_file():
        return {}
    try:
        state: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory / STATE} is damaged ({error}). Use an earlier checkpoint.") from error
    return state


def load_moments(directory: Path, *, model: nn.Module, optimizer: Optimizer) -> None:
    """Give a new optimizer another run's state (moments), but not that run's settings. Every rank must call it.

    Raises:
        UserError: if that run's optimizer is another one.
    """
    manifest.verify(directory)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    document = json.loads((directory / STATE).read_text(encoding="utf-8"))
    try:
        training_state.load_optimizer_state(model, optimizer, load_file(directory / OPTIMIZER), document["optimizer"])
    except UserError as error:
        raise UserError(f"{directory} does not fit this run. {error}") from error
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them.

    Args:
        directory: where they are, made at the first save.
        keep: how many to keep; 0 keeps all.

    Raises:
        ValueError: if `keep` is negative.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        if keep < 0:
            raise ValueError(f"keep ({keep}) must be 0, which keeps all checkpoints, or more")
        self.directory = Path(directory)
        self.keep = keep
        if distributed.rank() == 0:
            self._clean()

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Any,
        write_model: Callable[[Path, dict[str, Tensor]], object],
        state: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`. Every rank must call it; rank 0 writes.

        Args:
            model: the model itself, not a DDP wrapper.
            write_model: puts the whole state dict into a directory as a model that can be loaded alone.
            state: whatever else the recipe needs to go on, JSON-able.

        Returns:
            The checkpoint's directory.

        Raises:
            UserError: if it cannot be written, on every rank; the previous checkpoints are whole and nothing
                partial is left.
        """
        tensors, optimizer_rest = training_state.optimizer_state(model, optimizer)
        weights = distributed.full_state_dict(model)
        random_states = distributed.gather_texts(json.dumps(training_state.random_state()))
        failure = ""
        if distributed.rank() == 0:
            document = {
                "step": step,
                "state": dict(state or {}),
                "scheduler": training_state.scheduler_state(scheduler),
                "optimizer": optimizer_rest,
                "random": [json.loads(text) for text in random_states],
                "versions": {
                    "plmtune": importlib.metadata.version("plmtune"),
                    "torch": str(torch.__version__),
                    "python": platform.python_version(),
                },
            }

            def write(directory: Path) -> None:
                write_model(directory, weights)
                save_file({n: t.contiguous() for n, t in tensors.items()}, directory / OPTIMIZER)
                (directory / STATE).write_text(json.dumps(document), encoding="utf-8")

            needed = sum(t.nbytes for t in (*weights.values(), *tensors.values()))
            try:
                self._publish(step, write, needed)
            except UserError as error:
                failure = str(error)
        # The others learn of a full disk here, instead of waiting at the next exchange for one that is gone.
        failure = distributed.broadcast_text(failure)
        if failure:
            raise UserError(failure)
        return step_path(self.directory, step)

    def restore(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Any,
        read_model: Callable[[Path], Mapping[str, Tensor]],
    ) -> dict[str, Any] | None:
        """Put the newest whole checkpoint back into model, optimizer, scheduler and random generators.

        Every rank must call it and see the same files. Checkpoints that are damaged are passed over, with a
        warning that names the file.

        Args:
            read_model: gives the model's state dict from a directory that `write_model` filled.

        Returns:
            The `state` that was saved with it and its "step", or None if there is no checkpoint.

        Raises:
            UserError: if there are checkpoints and none is whole, or the newest does not fit this run.
        """
        path = self.newest_whole()
        if path is None:
            return None
        try:
            document = json.loads((path / STATE).read_text(encoding="utf-8"))
            tensors = load_file(path / OPTIMIZER)
            distributed.load_full_state_dict(model, read_model(path))
            training_state.load_optimizer_state(model, optimizer, tensors, document["optimizer"])
            training_state.load_scheduler_state(scheduler, document["scheduler"])
            states = document["random"]
            same_world = len(states) == distributed.world_size()
            training_state.load_random_state(states[distributed.rank() if same_world else 0])
        except UserError as error:
            raise UserError(f"{path} does not fit this run. {error}") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be used ({type(error).__name__}: {error}). Was it written by plmtune?"
            ) from error
        return {**document["state"], "step": int(document["step"])}

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose every file matches its manifest. Rank 0 reads and tells the others.

        Raises:
            UserError: if there are checkpoints and none is whole.
        """
        found, failure = "", ""
        if distributed.rank() == 0:
            refused = []
            for step in reversed(steps(self.directory)):
                path = step_path(self.directory, step)
                try:
                    manifest.verify(path)
                except UserError as error:
                    log.warning("Checkpoint refused: %s", error)
                    refused.append(str(error))
                    continue
                found = path.name
                if refused:
                    log.warning("Going on from %s instead.", path)
                break
            if refused and not found:
                failure = f"No checkpoint in {self.directory} is whole: " + " ".join(refused)
        found, failure = json.loads(distributed.broadcast_text(json.dumps([found, failure])))
        if failure:
            raise UserError(failure)
        return self.directory / found if found else None

    def _publish(self, step: int, write: Callable[[Path], None], needed: int) -> None:
        final = step_path(self.directory, step)
        temporary = self.directory / f".tmp-{final.name}-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise OSError(f"{free:,} bytes are free")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write(temporary)
            manifest.seal(temporary, step)
            manifest.sync(temporary)
            if final.exists():  # a damaged one that was passed over, or the same step saved again
                final.rename(self.directory / f".old-{final.name}-{os.getpid()}")
            temporary.rename(final)
            manifest.sync(self.directory)
            manifest.write_text(self.directory / LATEST, f"{final.name}\n")
        except (OSError, SafetensorError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise UserError(
                f"The checkpoint of step {step} cannot be written to {final}: {reason}. It needs about "
                f"{needed:,} bytes. Earlier checkpoints are as they were; make room and resume."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        for path in self.directory.glob(f".old-step-*-{os.getpid()}"):
            shutil.rmtree(path, ignore_errors=True)
        every = steps(self.directory)
        # Later ones were refused when this run was resumed: they belong to a past that did not happen.
        past = [step for step in every if step <= newest]
        for step in [*(past[: -self.keep] if self.keep else []), *every[len(past) :]]:
            path = step_path(self.directory, step)
            doomed = self.directory / f".old-{path.name}-{os.getpid()}"
            # Renamed first: a kill in the middle of the removal must not leave half of it under its name.
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _clean(self) -> None:
        """Remove what a killed process left behind; one that is alive may be writing."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            # Its own number is a dead one's too: in a container every start may get the same.
            if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
                name = path.name.removeprefix(".old-").rsplit("-", 1)[0]
                if path.name.startswith(".old-") and not (self.directory / name).exists():
                    _bring_back(path, self.directory / name)
                elif path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _bring_back(moved: Path, name: Path) -> None:
    """Undo the first half of an exchange that was cut short, unless what was moved away is not whole."""
    try:
        manifest.verify(moved)
        moved.rename(name)
    except UserError:
        shutil.rmtree(moved, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
