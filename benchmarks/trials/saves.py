"""Bar 2: SIGKILL of a process that saves, at random moments of a save, and what can be loaded afterwards."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import shutil
import signal
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from plmtune.errors import UserError
from plmtune.io.manifest import step_path, steps
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.trainer_state import latest_valid

from .place import FORKS, Place, torn
from .tally import Tally

WIDTH, LAYERS = 1024, 3  # 12 MiB of weights, 24 MiB of moments
KEEP = 2
FRESH = 10  # trials in one directory, each going on where the one before was killed


class Saver:
    """A model whose every number says which step it is of, and its checkpoints."""

    def __init__(self, directory: Path, *, background: bool) -> None:
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # makes the moments
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0)
        self.checkpoints = Checkpoints(directory, keep=KEEP, background=background, write_metadata=_write_metadata)

    def tensors(self) -> list[torch.Tensor]:
        moments = [self.optimizer.state[parameter] for parameter in self.model.parameters()]
        return [*self.model.parameters(), *(named[key] for named in moments for key in sorted(named))]

    @torch.no_grad()
    def become(self, step: int) -> None:
        """Take the state of `step`: no number in it is one of another step's."""
        for index, tensor in enumerate(self.tensors()):
            tensor.fill_(_number(step, index))
        torch.manual_seed(step)
        self.scheduler.last_epoch = step

    def save(self, step: int) -> None:
        """Save `step`; with `background` the state becomes another at once, as it does in training."""
        self.become(step)
        self.checkpoints.save(
            step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state={"marks": [step] * 2000},
        )
        if self.checkpoints.background:
            self.become(-step)

    def restore(self) -> int:
        """The step of the newest whole checkpoint, 0 if there is none."""
        path = latest_valid(self.checkpoints.directory)
        given: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self.state = self.checkpoints.restore(path, **given) if path else {}
        return int(self.state.get("step", 0))

    def torn(self, step: int) -> list[str]:
        """Complaints about what was restored and is not of `step`."""
        tensors = self.tensors()
        wrong = [index for index, tensor in enumerate(tensors) if not bool((tensor == _number(step, index)).all())]
        complaints = [f"{len(wrong)} of {len(tensors)} tensors are not of step {step}"] if wrong else []
        if self.state.get("marks") != [step] * 2000 or self.scheduler.last_epoch != step:
            complaints.append(f"state.json is not of step {step}")
        restored = torch.get_rng_state()
        if not torch.equal(restored, torch.Generator().manual_seed(step).get_state()):
            complaints.append(f"the random generator is not of step {step}")
        return complaints


def _number(step: int, index: int) -> float:
    return float(step * 64 + index)


def _write_metadata(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"saver": WIDTH}), encoding="utf-8")


def _saving(directory: str, background: bool, twice: bool, count: int, told: Connection) -> None:
    """In a child: save one step after another, and tell of each that is on the disk."""
    saver = Saver(Path(directory), background=background)
    step = saver.restore()
    told.send(("ready", step))
    for _ in range(count):
        step += 1
        for _ in range(1 + twice):
            saver.save(step)
            saver.checkpoints.wait()
            told.send(("saved", step))


def killed_while_saving(place: Place, count: int, generator: random.Random) -> Tally:
    """SIGKILL at a moment drawn evenly from two and a half saves; in the background and not, in turn.

    Every third process saves each step twice, so that one directory takes the place of another.
    """
    tally = Tally(
        "SIGKILL in a save",
        "the newest checkpoint said to be saved, or a later one, loads; every number is of its step; "
        "nothing unfinished is left",
    )
    root = place.path / "saves"
    length = _length_of_a_save(root / "length")
    tally.figures["seconds a save"] = length
    reader = Saver(root, background=False)
    for number in range(count):
        directory = root / f"{number // FRESH}"
        background, twice = number % 2 == 0, number % 3 == 2
        before, saved = _kill_one(directory, background, twice, generator.uniform(0, 2.5 * length))
        tally.saw(_phase(directory))
        complaints = torn(directory)
        reader.checkpoints = Checkpoints(directory, keep=KEEP)
        complaints += [f"{path.name} was left behind" for path in directory.glob(".*")]
        try:
            found = reader.restore()
            complaints += reader.torn(found) if found else []
            if not saved <= found <= saved + 1:
                complaints.append(f"step {saved} was saved, and step {found} is found")
        except UserError as error:
            complaints.append(str(error))
        tally.add(f"{number} (steps {before} to {saved})", complaints)
        if number % FRESH == FRESH - 1:
            shutil.rmtree(directory)
    return tally


def _kill_one(directory: Path, background: bool, twice: bool, delay: float) -> tuple[int, int]:
    """Start a saver and kill it `delay` after it is ready; returns the steps that it began with and told of."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = FORKS.Process(target=_saving, args=(str(directory), background, twice, 1000, theirs), daemon=True)
    process.start()
    theirs.close()
    _, before = ours.recv()
    time.sleep(delay)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the saver ended with {process.exitcode} before it was killed")
    saved = before
    try:
        while True:
            _, saved = ours.recv()
    except EOFError:
        return before, saved


def _length_of_a_save(directory: Path) -> float:
    """Median seconds of a save that nothing disturbs."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = FORKS.Process(target=_saving, args=(str(directory), False, False, 7, theirs), daemon=True)
    process.start()
    theirs.close()
    times = []
    try:
        while True:
            ours.recv()
            times.append(time.perf_counter())
    except EOFError:
        process.join()
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def _phase(directory: Path) -> str:
    """What the process was at when it was killed, by what it has left."""
    names = [path.name for path in directory.glob("*")] if directory.is_dir() else []
    if any(name.startswith(".latest.tmp") for name in names):
        return "writing latest"
    newest = max(steps(directory), default=0) if names else 0
    if any(name.startswith(".old-") for name in names):
        stage = next((directory / name for name in names if name.startswith(".tmp-")), None)
        return "exchanging two of one step" if stage else "removing an old one"
    for name in names:
        if name.startswith(".tmp-"):
            return _stage(directory / name)
    latest = directory / "latest"
    if newest and (not latest.exists() or latest.read_text().strip() != step_path(directory, newest).name):
        return "between the rename and latest"
    return "removing an old one" if len(steps(directory)) > KEEP else "between two saves"


def _stage(temporary: Path) -> str:
    """How far the files of an unfinished checkpoint are."""
    whole = 4 * WIDTH * WIDTH * LAYERS
    sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
    if any("manifest" in name for name in sizes):
        return "writing the manifest, or before the rename"
    if "state.json" in sizes:
        return "writing the small files"
    if "optimizer.safetensors" in sizes:
        return "writing moments" if sizes["optimizer.safetensors"] < 2 * whole else "bringing moments to the disk"
    if "model.safetensors" in sizes:
        return "writing weights" if sizes["model.safetensors"] < whole else "bringing weights to the disk"
    return "copying"
