"""Checkpoints: directories that are whole or not there, and from which training goes on byte for byte.

The protocol: copy the state to the host, and let training go on; every rank writes its share of the files into
``.tmp-step-00000500`` and brings them to the disk; ``manifest.json`` comes last, then one rename to
``step-00000500``, then `latest`. A process killed anywhere leaves the checkpoints before as they were.
See docs/checkpoints.md.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import math
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from plmtune.config.schema import CheckpointConfig, ValidationConfig
from plmtune.errors import NotFinite, Unreadable, UserError, unreadable
from plmtune.io import manifest, safetensors_writer
from plmtune.io.manifest import step_path, steps
from plmtune.models.checkpoint_files import Stored, locate, read_json
from plmtune.training import distributed
from plmtune.training import state as training_state
from plmtune.training.guard import check_weights
from plmtune.training.snapshot import Stage

log = logging.getLogger(__name__)

STATE = "state.json"
LATEST = "latest"
BEST = "best"
TOO_HIGH = "Start again with a lower optimizer.lr or weight decay."
# Some hundred bytes a parameter group and 20 KiB for each rank whose random numbers are its own.
_MAX_STATE_BYTES = 16 * 2**20
_UNFINISHED = re.compile(r"\.(?:tmp-step-|old-step-|latest\.tmp-|best\.tmp-)")


def latest_valid(directory: Path, *, once: bool = False) -> Path | None:
    """The newest checkpoint whose every file matches its manifest. Rank 0 reads and tells the others.

    Those that are damaged are passed over, with a warning that names the file.

    Args:
        once: hash a file that is as it was when it was last found right no more, see `manifest.check_files_once`.

    Raises:
        UserError: on every rank, if there are checkpoints and none is whole.
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
                raise  # steps would be lost that are perhaps whole
            except UserError as error:
                log.warning("Checkpoint refused: %s", error)
                refused.append(str(error))
                continue
            if refused:
                log.warning("Resuming from %s instead.", path)
            return path.name
        if refused:
            raise UserError(
                f"No checkpoint in {directory} is whole: {' '.join(refused)} Put a whole copy back, or start anew."
            )
        if directory.is_symlink() and not directory.exists():
            raise UserError(f"{directory} leads to {directory.readlink()}, which is not there. Is its disk mounted?")
        return ""

    found = distributed.broadcast_from_rank0(find)
    return directory / found if found else None


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """The state.json of a checkpoint; empty for a model without training state.

    Raises:
        UserError: if it is not what a checkpoint holds.
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
        step: optimizer steps that it has made.
        state: what the recipe saved, as `Checkpoints.save` was given it.
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
    """Give a new optimizer another run's state (moments), but not that run's settings. Every rank must call it.

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


@dataclass
class _Save:
    """A save that is under way: every rank writes its files, then rank 0 publishes all of them."""

    step: int
    needed: int
    job: Future[dict[str, Any]]
    publishing: bool = False


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them, and the best.

    Whoever makes one holds the run's lock: what looks unfinished in the directory was left by a dead process.

    Args:
        directory: where they are, made at the first save.
        keep: how many to keep; 0 keeps all.
        best: the metric by whose value one more is kept; None keeps none.
        mode: "min" or "max".
        background: write while training goes on, from a copy in host memory.
        state_dict: gives a model's tensors by their names in the file; `restore` writes into them.
        stem: of their files.
        write_metadata: writes what a directory needs, besides weights, to be loaded alone: config.json, tokenizer.
        file_bytes: larger weights and moments are split; several ranks share the files.

    Raises:
        ValueError: if `keep` is negative.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
        background: bool = True,
        state_dict: Callable[[Any], Mapping[str, Tensor]] = nn.Module.state_dict,
        stem: str = "model",
        write_metadata: Callable[[Path], object] = lambda directory: None,
        file_bytes: float = safetensors_writer.FILE_BYTES,
    ) -> None:
        if keep < 0:
            raise ValueError(f"keep ({keep}) must be 0, which keeps all checkpoints, or more")
        self.directory = Path(directory)
        self.keep = keep
        self.best = best
        self.mode = mode
        self.background = background
        self.state_dict = state_dict
        self.stem = stem
        self.write_metadata = write_metadata
        self.file_bytes = file_bytes
        self._stage = Stage(copies=background)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None
        self.pinned: int | None = None  # a step whose checkpoint is kept as long as it stands here
        self._from = 0  # the step that was restored
        self._own: set[int] = set()  # steps saved since
        if distributed.rank() == 0:
            self._clean()

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Any,
        state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> Path:
        """Save `step`. Every rank must call it; with `background` it returns when the state has been copied.

        Args:
            model: the model itself, not a DDP wrapper.
            state: whatever else the recipe needs to go on, JSON-able.
            metrics: what was measured at this very step; the best checkpoint is chosen by them.
            wait: until it is on the disk, whatever `background` says.

        Returns:
            The checkpoint's directory, there at once or after `wait`.

        Raises:
            UserError: on every rank, if this one or one before it cannot be written; the checkpoints that were
                there are whole, and nothing partial is left. NotFinite, if it holds NaN or an infinity.
        """
        try:
            self.wait()  # never two at a time: host memory and the disk are for one
        except NotFinite:
            raise
        except UserError as error:
            log.warning("%s", error)  # what stood in its way may be gone; if not, this one says so
        tensors, optimizer_rest = training_state.optimizer_state_dict(model, optimizer)
        random_states = distributed.gather_texts(json.dumps(training_state.random_state()))
        stems = {self.stem: self.state_dict(model), "optimizer": tensors}
        needed = sum(t.numel() * t.element_size() for named in stems.values() for t in named.values())
        distributed.broadcast_from_rank0(lambda: self._make_room(step, needed))
        snapshot = self._stage.take(stems, max_bytes=self.file_bytes, writers=self._writers(step))
        rest: dict[str, str] = {}
        if distributed.rank() == 0:
            rest = {name: json.dumps(content) for name, content in snapshot.indexes.items()}
            document = {
                "step": step,
                "state": dict(state or {}),
                "metrics": dict(metrics or {}),
                "scheduler": training_state.scheduler_state_dict(scheduler),
                "optimizer": optimizer_rest,
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
            rest[STATE] = json.dumps(document)  # now: the recipe's own state goes on changing
        job = self._pool.submit(self._write, step, snapshot.tensors, rest)
        self._save = _Save(step, needed, job)
        if wait or not self.background:
            self.wait()
        return step_path(self.directory, step)

    def poll(self) -> None:
        """See how a save in the background does. Every rank must call it, after each step.

        Raises:
            UserError: on every rank, if it failed.
        """
        if self._save is not None and not distributed.any_rank(not self._save.job.done()):
            self._advance(self._save)

    def describe_newest(self) -> str:
        """Say which checkpoint of this run is the newest. Rank 0 knows."""
        newest = max(self.saved, self._from)
        return f"Its newest checkpoint is that of step {newest}." if newest else "No step was saved before."

    def failure(self) -> str:
        """Return why a save in the background failed; empty if none did. Every rank must call it, after each step.

        Raises:
            NotFinite: if it holds NaN or an infinity.
        """
        try:
            self.poll()
        except NotFinite:
            raise
        except UserError as error:
            return str(error)
        return ""

    def check_weights(self, model: nn.Module, step: int, *, since: int) -> None:
        """Refuse weights that hold NaN or an infinity: no later update can mend them. Every rank must call it.

        Args:
            step: the last step; since: the step whose update made them.

        Raises:
            NotFinite: on every rank.
        """

        def message(names: str) -> str:
            kept = distributed.broadcast_from_rank0(self.describe_newest)
            return (
                f"step {step}: weights are not finite since the update of step {since} ({names}), so they are not "
                f"saved. {kept} {TOO_HIGH}"
            )

        check_weights(dict(model.named_parameters()), message)

    @property
    def saved(self) -> int:
        """The newest step that this object has brought to the disk; 0 if there is none. Rank 0 knows."""
        return max(self._own, default=0)

    def wait(self) -> None:
        """Wait until the save under way, if there is one, is on the disk. Every rank must call it.

        Raises:
            UserError: on every rank, if it failed.
        """
        while self._save is not None:
            # In turns of a second, so that a long save is no silent process to the others.
            futures.wait([self._save.job], timeout=1)
            self.poll()

    def close(self) -> None:
        """Let this process's writing come to its end, without a word to other ranks: one may be gone."""
        self._pool.shutdown()

    def restore(self, path: Path, *, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
        """Put a checkpoint back into model, optimizer, scheduler and random generators.

        Every rank must call it and see the same files, whatever the number of processes that wrote them.

        Args:
            path: what `latest_valid` found.

        Returns:
            The `state` that was saved with it and its "step".

        Raises:
            UserError: if it does not fit this run.
        """
        try:
            document = read_trainer_state(path)
            distributed.load_full_tensors(self.state_dict(model), Stored(locate(path, self.stem)))
            check_weights(
                self.state_dict(model),
                lambda names: (
                    f"it holds weights that are not finite ({names}). Delete it, and the run resumes from "
                    "the one before it."
                ),
            )
            moments = Stored(locate(path, "optimizer"))
            training_state.load_optimizer_state_dict(model, optimizer, moments, document["optimizer"])
            training_state.load_scheduler_state_dict(scheduler, document["scheduler"])
            which, rank = document["random"]["of"], distributed.rank()
            same = len(which) == distributed.world_size()
            training_state.load_random_state(document["random"]["states"][which[rank if same else 0]])
            if rank and not same:  # no state of this rank was saved, and that of rank 0 would repeat its dropout masks
                training_state.seed_everything(int(torch.randint(2**31, ())) + rank)
        except UserError as error:
            what = "cannot be resumed:" if isinstance(error, NotFinite) else "does not fit this run."
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
        """Put the weights of `step`, and nothing else of it, into a model. Every rank must call it.

        Raises:
            UserError: if its checkpoint is not there, is damaged, or does not fit.
        """
        path = step_path(self.directory, step)
        distributed.broadcast_from_rank0(lambda: manifest.check_files(path)["step"])
        distributed.load_full_tensors(self.state_dict(model), Stored(locate(path, self.stem)))

    def _make_room(self, step: int, needed: int) -> None:
        """Make the directory to write into."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise OSError(f"{free:,} bytes are free")
            shutil.rmtree(self._temporary(step), ignore_errors=True)
            self._temporary(step).mkdir()
        except OSError as error:
            raise UserError(self._failed(step, error, needed)) from error

    def _writers(self, step: int) -> list[int]:
        """The ranks that see the directory of rank 0; on machines without a common disk it is rank 0's alone."""
        seen = distributed.gather_texts("seen" if self._temporary(step).is_dir() else "")
        return [rank for rank, text in enumerate(seen) if text]

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, str]) -> dict[str, Any]:
        """Write this rank's files; returns their bytes and hashes. Runs in the background."""
        directory = self._temporary(step)
        # Here, and not before the copy: training does not wait for it.
        if names := [name for held in tensors.values() for name in safetensors_writer.not_finite(held)]:
            raise NotFinite(
                f"step {step}: weights or moments are not finite ({safetensors_writer.listed(names)}), so it is not "
                f"saved. "
                f"{self.describe_newest()} {TOO_HIGH}"
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
        """All ranks are done with what they had to do: tell each other how it went, and go on or end."""
        error = save.job.exception()
        told = distributed.gather_texts(
            json.dumps(
                {"failure": self._failed(save.step, error, save.needed), "finite": not isinstance(error, NotFinite)}
                if error
                else save.job.result()
            )
        )
        outcomes = [json.loads(text) for text in told]
        failures = sorted((outcome["finite"], outcome["failure"]) for outcome in outcomes if "failure" in outcome)
        if failures:
            self._save = None
            if distributed.rank() == 0:
                shutil.rmtree(self._temporary(save.step), ignore_errors=True)
            if error is not None and not isinstance(error, OSError | NotFinite):
                raise error
            finite, said = failures[0]
            raise UserError(said) if finite else NotFinite(said)
        if save.publishing or distributed.world_size() == 1:
            self._save = None
            return
        entries = {name: entry for outcome in outcomes for name, entry in outcome.items()}
        save.publishing = True
        if distributed.rank() == 0:
            save.job = self._pool.submit(self._publish, save.step, entries)

    def _publish(self, step: int, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest of what was written, give it its name, and drop what is no longer wanted."""
        final, temporary = step_path(self.directory, step), self._temporary(step)
        manifest.write(temporary, step, entries)
        manifest.sync(temporary)
        if final.exists():  # a damaged one that was passed over, or the same step saved again
            final.rename(self.directory / f".old-{final.name}")
        temporary.rename(final)
        manifest.sync(self.directory)
        manifest.write_text(self.directory / LATEST, f"{final.name}\n")
        self._own.add(step)
        self._prune()
        return {}

    def _failed(self, step: int, error: BaseException, needed: int) -> str:
        if isinstance(error, NotFinite):
            return str(error)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        number = error.errno if isinstance(error, OSError) else None
        remedy = {errno.EFBIG: "raise the limit on files (ulimit -f)", errno.EACCES: "let it be written"}.get(
            number or 0, "make room"
        )
        earlier = "Earlier checkpoints are as they were" if steps(self.directory) else "No step was saved before"
        return (
            f"The checkpoint of step {step} cannot be written to {step_path(self.directory, step)}: {reason}. It needs "
            f"about {needed:,} bytes. {earlier}; {remedy} and resume."
        )

    def _temporary(self, step: int) -> Path:
        return self.directory / f".tmp-{step_path(self.directory, step).name}"

    def _prune(self) -> None:
        every = steps(self.directory)
        # Others were refused when this run was resumed: they belong to a past that did not happen.
        past = [step for step in every if step <= self._from or step in self._own]
        kept = set(past[-self.keep :])  # with keep=0 all
        best = self._best(past)
        if self.pinned is not None:
            kept.add(self.pinned)
        if best is not None:
            kept.add(best)
            name = step_path(self.directory, best).name
            manifest.write_text(self.directory / BEST, f"{name}\n")
        else:
            (self.directory / BEST).unlink(missing_ok=True)
        for step in every:
            if step not in kept:
                path = step_path(self.directory, step)
                # Renamed first: a kill in the middle of the removal must not leave half of it under its name.
                path.rename(self.directory / f".old-{path.name}")
        for path in self.directory.glob(".old-step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _best(self, past: list[int]) -> int | None:
        """The step with the best value of the metric `best`; of equal ones the newest."""
        values = {step: self._metric(step_path(self.directory, step)) for step in past} if self.best else {}
        sign = -1 if self.mode == "min" else 1
        # A value that is not finite, or is missing, is no value.
        ranked = [(sign * v, step) for step, v in values.items() if isinstance(v, int | float) and math.isfinite(v)]
        return max(ranked)[1] if ranked else None

    def _metric(self, path: Path) -> Any:
        """What the checkpoint at `path` has of the metric `best`; None of one whose word does not count."""
        try:
            whole = manifest.read(path)["files"][STATE]["xxh3_128"] == manifest.digest(path / STATE)
            return read_trainer_state(path)["metrics"].get(self.best) if whole else None
        except (UserError, LookupError, TypeError, AttributeError, OSError):
            return None

    def _clean(self) -> None:
        """Remove what a killed process left behind, and undo an exchange that it did not finish."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if not _UNFINISHED.match(path.name):
                continue
            name = path.name.removeprefix(".old-")
            if path.name.startswith(".old-") and not (self.directory / name).exists():
                _bring_back(path, self.directory / name)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _bring_back(moved: Path, name: Path) -> None:
    """Undo the first half of an exchange that was cut short, unless what was moved away is not whole."""
    try:
        manifest.check_files(moved)
        moved.rename(name)
    except Unreadable:
        log.warning("%s cannot be read, and is left as it is.", moved)
    except UserError:
        shutil.rmtree(moved, ignore_errors=True)


def open_checkpoints(
    directory: Path,
    settings: CheckpointConfig,
    *,
    state_dict: Callable[[Any], Mapping[str, Tensor]],
    write_metadata: Callable[[Path], object],
    stem: str = "model",
) -> Checkpoints:
    """The checkpoints of a run by its config, see `Checkpoints`."""
    return Checkpoints(
        directory,
        keep=settings.keep,
        best=settings.best,
        mode=settings.mode,
        background=settings.background,
        state_dict=state_dict,
        write_metadata=write_metadata,
        stem=stem,
    )


def best_checkpoint_notes(settings: CheckpointConfig, validation: ValidationConfig) -> list[str]:
    """A line to print where a run saves at steps that it does not validate."""
    save, validate = settings.every, validation.every
    if not (settings.best and save and validate and save % validate):
        return []
    return [
        f"best checkpoint: only steps that are measured and saved count, each {math.lcm(save, validate)}th; "
        "set checkpoint.every to a multiple of validation.every"
    ]
