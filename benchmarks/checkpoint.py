"""What a checkpoint costs: the training loop's wait for a save in the background, hashing, and restoring.

    python benchmarks/checkpoint.py            some five minutes on two cores, 0.7 GB of state
    python benchmarks/checkpoint.py --quick    a tenth of the state

A PLM with AdamW takes steps on a tiny batch, so that a step is mostly the optimizer's pass over memory and a save is
as long as many steps. Saves in the background and saves that are waited for alternate. The stall of one in the
background is the time that the loop spends in save() and, after each step, in poll(), until the checkpoint is on the
disk; that of the other is the time in save(). Steps beside the writing are compared with steps alone: what the
writer takes from them is no stall, and is reported apart. So is the first save, whose buffers the system must first
hand out. Hashing's share compares saves that are waited for with saves whose hash is a constant.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from side_by_side import machine
from torch.optim.lr_scheduler import LambdaLR

from plmtune.io import manifest, safetensors_writer
from plmtune.io.manifest import step_path
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.plm import plm
from plmtune.optim.optimizers import adamw
from plmtune.registry import component
from plmtune.training.checkpoint import Checkpoints

VOCAB, BATCH, SEQ_LEN = 8192, 1, 16
STALL_BAR, HASH_BAR = 0.10, 0.05


class Trainer:
    """A model in training, and its checkpoints."""

    def __init__(self, width: int, layers: int, root: Path) -> None:
        torch.manual_seed(0)
        self.model = plm(
            VOCAB,
            attention=component("attention", "mla", kv_lora_rank=64, qk_nope_head_dim=48, qk_rope_head_dim=16,
                                v_head_dim=64),
            ffn=component("ffn", "squared_relu", hidden_dim=4 * width),
            embed_dim=width,
            num_layers=layers,
            num_heads=width // 64,
            max_seq_len=512,
        )  # fmt: skip
        self.optimizer = adamw(self.model)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0)
        self.loss = cross_entropy()
        self.tokens = torch.randint(VOCAB, (BATCH, SEQ_LEN + 1))
        self.step = 0
        self.checkpoints = {
            background: Checkpoints(root / str(background), keep=1, background=background)
            for background in (True, False)
        }
        self.train()  # makes the moments

    @property
    def bytes(self) -> int:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *moments])

    def train(self) -> float:
        """Take a step; returns its seconds."""
        start = time.perf_counter()
        hidden = self.model(self.tokens[:, :-1], hidden=True).flatten(0, 1)
        loss = self.loss(hidden, self.model.head_weight, self.tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return time.perf_counter() - start

    def save(self, *, background: bool) -> float:
        """Save this step; returns the seconds until it returns."""
        return seconds(
            lambda: self.checkpoints[background].save(
                self.step, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler
            )
        )

    def saved(self) -> Path:
        """The newest checkpoint of those that were waited for."""
        checkpoints = self.checkpoints[False].directory
        return checkpoints / (checkpoints / "latest").read_text().strip()


@dataclass
class Stalls:
    """Seconds of each save, and of steps."""

    background: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)  # steps while a checkpoint is written
    alone: list[float] = field(default_factory=list)


def stalls(trainer: Trainer, rounds: int) -> Stalls:
    """Saves in the background and saves that are waited for, in turn."""
    found = Stalls()
    checkpoints = trainer.checkpoints[True]
    for number in range(2 * rounds):
        if number % 2 == 1:
            trainer.train()
            found.waited.append(trainer.save(background=False))
            continue
        found.alone += [trainer.train() for _ in range(6)]
        stall = trainer.save(background=True)
        path = step_path(checkpoints.directory, trainer.step)
        while not path.exists():
            found.beside.append(trainer.train())
            stall += seconds(checkpoints.poll)
        checkpoints.wait()  # only for what the checkpoint before leaves to be removed
        found.background.append(stall)
    return found


def hashing(trainer: Trainer, rounds: int) -> tuple[float, float]:
    """Median seconds of a save that is waited for, with and without hashing."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    constant = "0" * 32
    for number in range(rounds):
        for hashed in (True, False) if number % 2 == 0 else (False, True):
            trainer.train()
            if hashed:
                taken[hashed].append(trainer.save(background=False))
                continue
            with (
                mock.patch.object(safetensors_writer, "_digest", lambda parts: constant),
                mock.patch.object(manifest, "digest", lambda path: constant),
            ):
                taken[hashed].append(trainer.save(background=False))
    return statistics.median(taken[True]), statistics.median(taken[False])


def restoring(trainer: Trainer, rounds: int) -> tuple[float, float]:
    """Median seconds to verify a checkpoint, and to load one that is verified."""
    trainer.save(background=False)  # hashed, whatever was tried before
    path = trainer.saved()
    state: dict[str, Any] = {"model": trainer.model, "optimizer": trainer.optimizer, "scheduler": trainer.scheduler}
    verified = [seconds(lambda: manifest.check_files(path)) for _ in range(rounds)]
    loaded = [seconds(lambda: trainer.checkpoints[False].restore(path, **state)) for _ in range(rounds)]
    return statistics.median(verified), statistics.median(loaded)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the state, fewer rounds")
    parser.add_argument("--rounds", type=int, default=7, help="saves of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--directory", type=Path, help="on the disk to be measured; default: the system's temporary one"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    width, layers, rounds = (256, 8, 3) if options.quick else (640, 12, options.rounds)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.directory) as root:
        trainer = Trainer(width, layers, Path(root))
        first = stalls(trainer, 1)
        later = stalls(trainer, rounds)
        hashed, unhashed = hashing(trainer, rounds)
        verify, load = restoring(trainer, min(rounds, 3))
        size = trainer.bytes
    background, waited = statistics.median(later.background), statistics.median(later.waited)
    beside, alone = statistics.median(later.beside), statistics.median(later.alone)
    print(f"{machine()}\n{size / 1e6:,.0f} MB of weights and moments, {rounds} saves of each kind, medians\n")
    print("| what | measured | bar |\n|---|---|---|")
    print(f"| a save that is waited for | {waited:.3f} s, {size / waited / 1e6:,.0f} MB/s | |")
    print(f"| stall by one in the background | {background:.3f} s, {background / waited:.1%} | {STALL_BAR:.0%} |")
    print(
        f"| the same, the first (fresh buffers) | {first.background[0]:.3f} s, {first.background[0] / waited:.1%} | |"
    )
    print(f"| a step beside the writing, {len(later.beside)} of them | {beside:.3f} s against {alone:.3f} s alone, "
          f"{beside / alone:.2f}x | |")  # fmt: skip
    print(f"| hashing's share of a save | {hashed:.3f} s against {unhashed:.3f} s without, "
          f"{(hashed - unhashed) / hashed:.1%} | {HASH_BAR:.0%} |")  # fmt: skip
    print(f"| verifying, before a resume | {verify:.3f} s, {size / verify / 1e6:,.0f} MB/s | |")
    print(f"| loading | {load:.3f} s, {size / load / 1e6:,.0f} MB/s | |")


if __name__ == "__main__":
    main()
