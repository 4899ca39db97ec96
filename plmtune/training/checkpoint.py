"""Checkpoints: directories that are complete or absent, and from which training resumes bit by bit.

The protocol: the state is copied to the host while training waits; then every rank writes its share of the files into
``.tmp-step-00000500`` and syncs them to the disk; ``manifest.json`` comes last, then one rename to ``step-00000500``,
then `latest`. A kill at any point leaves the earlier checkpoints as they were. See docs/checkpoints.md.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from plmtune.errors import UserError, WeightsNotFinite, unreadable
from plmtune.io import manifest, safetensors_writer
from plmtune.io.manifest import step_path, steps
from plmtune.models.checkpoint_files import Stored, locate
from plmtune.parallel.pipeline import whole_of
from plmtune.training import distributed
from plmtune.training import state as training_state
from plmtune.training.ema import STEM as EMA
from plmtune.training.ema import Ema
from plmtune.training.guard import not_finite
from plmtune.training.snapshot import SnapshotBuffers
from plmtune.training.trainer_state import STATE, best_step, prune, read_trainer_state, remove_unfinished

log = logging.getLogger(__name__)

LATEST = "latest"
TOO_HIGH = "Start again with a lower optimizer.lr or weight decay."


@dataclass
class _Save:
    """A save in progress: every rank writes its files, then rank 0 publishes all of them."""

    step: int
    needed: int
    job: Future[dict[str, Any]]
    publishing: bool = False


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them, and the best.

    The caller holds the run's lock, so unfinished files in the directory were left by a dead process.

    Args:
        directory: made at the first save.
        every: the steps between saves, for the caller; 0: it saves at the end.
        keep: how many to keep; 0 keeps all.
        best: the metric by whose value one more is kept; None keeps none.
        mode: "min" or "max".
        background: write while training continues, from a copy in host memory.
        state_dict: gives a model's tensors by their names in the file; `restore` writes into them.
        stem: of their files.
        write_metadata: writes what a directory needs, besides weights, to be loaded alone: config.json, tokenizer.
        file_bytes: larger weights and moments are split; several ranks share the files.

    Attributes:
        pinned: a step whose checkpoint is kept as long as it stands here.
    """

    directory: Path = field(kw_only=False)
    every: int = 0
    keep: int = 2
    best: str | None = None
    mode: Literal["min", "max"] = "min"
    background: bool = True
    state_dict: Callable[[Any], Mapping[str, Tensor]] = nn.Module.state_dict
    stem: str = "model"
    write_metadata: Callable[[Path], object] = lambda directory: None
    file_bytes: float = safetensors_writer.FILE_BYTES
    pinned: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ValueError(f"keep ({self.keep}) must be 0, which keeps all checkpoints, or more")
        self._buffers = SnapshotBuffers(copies=self.background)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None
        self._from = 0  # the step that was restored
        self._own: set[int] = set()  # steps saved since
        if distributed.rank() == 0:
            remove_unfinished(self.directory)

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Any,
        ema: Ema | None = None,
        state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> Path:
        """Save `step`. Every rank must call it; with `background` it returns when the state has been copied.

        Args:
            model: the model itself, not a DDP wrapper.
            state: what else the recipe needs to resume, JSON-able.
            metrics: what was measured at this very step; the best checkpoint is chosen by them.
            wait: return when it is on the disk, also with `background`.

        Returns:
            The checkpoint's directory, there at once or after `wait`.

        Raises:
            UserError: on every rank, if it cannot be written; earlier checkpoints stay valid, and nothing partial is
                left. WeightsNotFinite, if it holds NaN or an infinity.
        """
        try:
            self.wait()  # one at a time: host memory and the disk have room for one
        except WeightsNotFinite:
            raise
        except UserError as error:
            log.warning("%s", error)  # the cause may be gone; if not, this save fails too
        tensors, optimizer_rest = training_state.optimizer_state_dict(model, optimizer)
        whole = whole_of(model)
        if whole is not None:
            optimizer_rest = training_state.of_all_stages(optimizer_rest, whole)
        random_states = distributed.gather_texts(json.dumps(training_state.random_state()))
        stems = {self.stem: self.state_dict(model), "optimizer": tensors, **({EMA: ema.tensors} if ema else {})}
        orders = self._orders(whole, stems, optimizer_rest)
        held_by_all = {stem: distributed.catalogue(named, orders[stem]) for stem, named in stems.items()}
        needed = sum(held.num_bytes for named in held_by_all.values() for held in named.values())
        distributed.broadcast_from_rank0(lambda: self._make_room(step, needed))
        # Without a common disk the directory is rank 0's alone.
        seen = distributed.gather_texts("seen" if self._temporary(step).is_dir() else "")
        writers = [rank for rank, text in enumerate(seen) if text]
        stage_size = getattr(model, "stage_size", distributed.world_size())
        held, indexes = self._buffers.take(
            stems, held_by_all, max_bytes=self.file_bytes, writers=writers, stage_size=stage_size
        )
        rest: dict[str, str] = {}
        if distributed.rank() == 0:
            rest = {name: json.dumps(content) for name, content in indexes.items()}
            document = {
                "step": step,
                "state": dict(state or {}),
                "metrics": dict(metrics or {}),
                "scheduler": training_state.scheduler_state_dict(scheduler),
                "optimizer": optimizer_rest,
                **({"ema": ema.updates} if ema else {}),
                # Ranks in the same state share one.
                "random": {
                    "states": [json.loads(text) for text in dict.fromkeys(random_states)],
                    "of": [list(dict.fromkeys(random_states)).index(text) for text in random_states],
                },
                "versions": {
                    "plmtune": importlib.metadata.version("plmtune"),
                    "torch": str(torch.__version__),
                    "python": platform.python_version(),
                },
            }
            rest[STATE] = json.dumps(document)  # now, as the recipe's state changes in the next step
        job = self._pool.submit(self._write, step, held, rest)
        self._save = _Save(step, needed, job)
        if wait or not self.background:
            self.wait()
        return step_path(self.directory, step)

    def _orders(
        self, whole: nn.Module | None, stems: Mapping[str, Any], optimizer_rest: Mapping[str, Any]
    ) -> dict[str, list[str] | None]:
        """For each stem the names in the order of one process, where ranks hold different ones."""
        if whole is None:
            return dict.fromkeys(stems)
        in_groups = [name for group in optimizer_rest["groups"] for name in group["params"]]
        in_files = list(self.state_dict(whole))
        return {stem: in_groups if stem == "optimizer" else in_files for stem in stems}

    def poll(self) -> None:
        """Continue or finish a save in the background; if it failed, every rank raises a UserError.

        Every rank must call it, after each step.
        """
        if self._save is not None and not distributed.any_rank(not self._save.job.done()):
            self._advance(self._save)

    def newest_message(self) -> str:
        """A sentence that names the newest checkpoint of this run. Only rank 0 may call it."""
        newest = max(self.saved, self._from)
        return f"Its newest checkpoint is that of step {newest}." if newest else "No step was saved before."

    def has_failed(self, message: Callable[[str], None]) -> bool:
        """Poll; whether a save in the background failed, which is reported, or raised for numbers that are not finite.

        Every rank must call it, after each step.
        """
        try:
            self.poll()
        except UserError as error:
            if isinstance(error, WeightsNotFinite):
                raise
            message(f"{error}\nTrying once more, with the present state.")
            return True
        return False

    def check_weights(self, model: nn.Module, step: int, *, since: int) -> None:
        """Refuse weights that hold NaN or an infinity, which no later update removes. Every rank must call it.

        Args:
            step: the last step.
            since: the step whose update produced them.
        """
        if names := not_finite(dict(model.named_parameters())):
            with suppress(UserError):  # a save in progress may become the newest checkpoint
                self.wait()
            kept = distributed.broadcast_from_rank0(self.newest_message)
            raise WeightsNotFinite(
                f"step {step}: weights are not finite since the update of step {since} ({names}), so they are not "
                f"saved. {kept} {TOO_HIGH}"
            )

    @property
    def saved(self) -> int:
        """The newest step that this object has written; 0 if there is none, and on other ranks than 0."""
        return max(self._own, default=0)

    def wait(self) -> None:
        """Wait until the save in progress, if there is one, is on the disk, as `poll` does. Every rank must call it."""
        while self._save is not None:
            # At most a second at a time: in a longer silence the other ranks would take this one for dead.
            futures.wait([self._save.job], timeout=1)
            self.poll()

    def close(self) -> None:
        """Finish this process's writing, without an exchange with other ranks: one may be gone."""
        self._pool.shutdown()

    def restore(
        self, path: Path, *, model: nn.Module, optimizer: Optimizer, scheduler: Any, ema: Ema | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint into model, optimizer, scheduler and random generators.

        Every rank must call it and see the same files. Any number of processes may have written them.

        Args:
            path: a checkpoint that `latest_valid` found.

        Returns:
            Its `state`, and its "step".
        """
        try:
            document = read_trainer_state(path)
            distributed.load_full_tensors(self.state_dict(model), Stored(locate(path, self.stem)))
            if names := not_finite(self.state_dict(model)):
                raise WeightsNotFinite(
                    f"it holds weights that are not finite ({names}). Delete it, and the run resumes from "
                    "the one before it."
                )
            moments = Stored(locate(path, "optimizer"))
            training_state.load_optimizer_state_dict(model, optimizer, moments, document["optimizer"])
            training_state.load_scheduler_state_dict(scheduler, document["scheduler"])
            if ema:
                distributed.load_full_tensors(ema.tensors, Stored(locate(path, EMA)))
                ema.updates = int(document["ema"])
            which, rank = document["random"]["of"], distributed.rank()
            same = len(which) == distributed.world_size()
            training_state.load_random_state(document["random"]["states"][which[rank if same else 0]])
            if rank and not same:  # this rank has no saved state, and that of rank 0 would repeat its dropout masks
                training_state.seed_everything(int(torch.randint(2**31, ())) + rank)
        except UserError as error:
            what = "cannot be resumed:" if isinstance(error, WeightsNotFinite) else "does not fit this run."
            raise UserError(f"{path} {what} {error}") from error
        except OSError as error:
            raise unreadable(path, error) from error
        except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be used ({type(error).__name__}: {error}). Was it written by plmtune?"
            ) from error
        self._from = int(document["step"])
        return {**document["state"], "step": self._from}

    def load_weights(self, step: int, model: nn.Module) -> None:
        """Load the weights of `step`, and nothing else of it, into a model. Every rank must call it."""
        path = step_path(self.directory, step)
        distributed.broadcast_from_rank0(lambda: manifest.check_files(path)["step"])
        distributed.load_full_tensors(self.state_dict(model), Stored(locate(path, self.stem)))

    def _make_room(self, step: int, needed: int) -> None:
        """Check the free space, and make the directory to write into."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise OSError(f"{free:,} bytes are free")
            shutil.rmtree(self._temporary(step), ignore_errors=True)
            self._temporary(step).mkdir()
        except OSError as error:
            raise UserError(self._failed(step, error, needed)) from error

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, str]) -> dict[str, Any]:
        """Write this rank's files in the background; returns their bytes and hashes."""
        directory = self._temporary(step)
        # After the copy, so that training does not wait for it.
        if names := [name for held in tensors.values() for name in safetensors_writer.not_finite(held)]:
            raise WeightsNotFinite(
                f"step {step}: weights or moments are not finite ({safetensors_writer.listed(names)}), so it is not "
                f"saved. {self.newest_message()} {TOO_HIGH}"
            )
        entries = {name: safetensors_writer.write(directory / name, held) for name, held in tensors.items()}
        for name, text in rest.items():
            (directory / name).write_text(text, encoding="utf-8")
        if distributed.rank() == 0:
            self.write_metadata(directory)
        if distributed.world_size() == 1:
            self._publish(step, entries)
        return entries

    def _advance(self, save: _Save) -> None:
        """All ranks have done their part: exchange the outcomes, then publish, or fail on every rank."""
        error = save.job.exception()
        texts = distributed.gather_texts(
            json.dumps(
                {
                    "failure": self._failed(save.step, error, save.needed),
                    "finite": not isinstance(error, WeightsNotFinite),
                }
                if error
                else save.job.result()
            )
        )
        outcomes = [json.loads(text) for text in texts]
        failures = sorted((outcome["finite"], outcome["failure"]) for outcome in outcomes if "failure" in outcome)
        if failures:
            self._save = None
            if distributed.rank() == 0:
                shutil.rmtree(self._temporary(save.step), ignore_errors=True)
            if error is not None and not isinstance(error, OSError | WeightsNotFinite):
                raise error
            finite, message = failures[0]
            raise UserError(message) if finite else WeightsNotFinite(message)
        if save.publishing or distributed.world_size() == 1:
            self._save = None
            return
        entries = {name: entry for outcome in outcomes for name, entry in outcome.items()}
        save.publishing = True
        if distributed.rank() == 0:
            save.job = self._pool.submit(self._publish, save.step, entries)

    def _publish(self, step: int, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, give the directory its name, and remove checkpoints that are no longer kept."""
        final, temporary = step_path(self.directory, step), self._temporary(step)
        manifest.write(temporary, step, entries)
        manifest.sync(temporary)
        if final.exists():  # a damaged one that was skipped, or the same step saved again
            final.rename(self.directory / f".old-{final.name}")
        temporary.rename(final)
        manifest.sync(self.directory)
        manifest.write_text(self.directory / LATEST, f"{final.name}\n")
        self._own.add(step)
        # Later steps of an earlier attempt were refused when this run resumed: they count for nothing.
        own = [saved for saved in steps(self.directory) if saved <= self._from or saved in self._own]
        kept = {*own[-self.keep :], *([] if self.pinned is None else [self.pinned])}  # with keep=0 all
        prune(self.directory, kept, best_step(self.directory, own, self.best, self.mode))
        return {}

    def _failed(self, step: int, error: BaseException, needed: int) -> str:
        if isinstance(error, WeightsNotFinite):
            return str(error)
        reason, number = getattr(error, "strerror", None) or error, getattr(error, "errno", None)
        remedies = {errno.EFBIG: "raise the limit on files (ulimit -f)", errno.EACCES: "allow writing to it"}
        remedy = remedies.get(number or 0, "make room")
        earlier = "Earlier checkpoints are as they were" if steps(self.directory) else "No step was saved before"
        return (
            f"The checkpoint of step {step} cannot be written to {step_path(self.directory, step)}: {reason}. It needs "
            f"about {needed:,} bytes. {earlier}; {remedy} and resume."
        )

    def _temporary(self, step: int) -> Path:
        return self.directory / f".tmp-{step_path(self.directory, step).name}"
