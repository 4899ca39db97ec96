"""What options of training give a small model: held-out loss at equal tokens, its spread over seeds, time of a step.

    OMP_NUM_THREADS=1 python benchmarks/training_options.py [--quick] [--seeds 1 2 3] [--arms "muon, cautious" ...]

A Llama (4 layers of 128, 4 heads, 2 KV heads, the bundled vocabulary) reads real text in rows of 128 tokens. A seed
gives weights and rows, the same rows for every arm; the arms take turns in one process, step by step, so that a busy
machine slows all of them. The learning rates were found by shorter runs of one seed. The first 95% of
the text are trained on, and the loss is of the beginning of the rest, in nats a token, without z-loss. A step's time is
the median of its CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from side_by_side import machine
from torch import Tensor

from plmtune.config.compose import build
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.optim.schedules import wsdc
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import bundled

DATA = Path("../shared/data/pretrain/python311_docs_rst_11mb.txt")
LENGTH, ROWS, HELD_OUT = 128, 4, 128  # tokens of a row, rows of a step, rows that are measured


class Arm(NamedTuple):
    """One way to train.

    Attributes:
        base: the arm that it is compared with.
    """

    base: str
    optimizer: dict[str, Any] = {}  # noqa: RUF012 - read only
    z_loss: float = 0.0
    value_embed: int | None = None


ARMS = {
    "adamw": Arm("adamw"),
    "adamw, z_loss=1e-4": Arm("adamw", z_loss=1e-4),
    "adamw, value_embed=2": Arm("adamw", value_embed=2),
    "muon": Arm("adamw"),
    "muon, normuon_beta2=0.95": Arm("muon", {"normuon_beta2": 0.95}),
    "muon, cautious": Arm("muon", {"cautious": True}),
    "muon, value_embed=2": Arm("muon", value_embed=2),
}


class Trained:
    """A model in training by one arm."""

    def __init__(self, name: str, seed: int, steps: int, rates: dict[str, dict[str, float]]) -> None:
        arm, kind = ARMS[name], name.split(",")[0]
        attention = component("attention", "gqa", num_kv_heads=2, value_embed=arm.value_embed)
        sizes: dict[str, Any] = {"embed_dim": 128, "num_layers": 4, "num_heads": 4, "max_seq_len": LENGTH}
        self.model: Decoder = llama(
            bundled().vocab_size, attention=attention, ffn=component("ffn", "swiglu", hidden_dim=352), **sizes
        ).train()
        self.model.init_weights(torch.Generator().manual_seed(seed))
        chosen = component("optimizer", kind, **rates[kind], **arm.optimizer)
        self.optimizer = build("optimizer", chosen, model=self.model)
        self.scheduler = wsdc(self.optimizer, steps, ROWS * LENGTH, warmup="5%", decay="60%", final_factor=0.02)
        self.loss = cross_entropy(z_loss=arm.z_loss)
        self.seconds: list[float] = []

    def mean_loss(self, rows: Tensor) -> Tensor:
        """Nats a token of rows (Tensor), [b, s + 1]."""
        hidden = self.model(rows[:, :-1], hidden=True).flatten(0, 1)
        return self.loss(hidden, self.model.head_weight, rows[:, 1:].flatten()) / rows[:, 1:].numel()

    def step(self, rows: Tensor) -> None:
        begin = time.process_time()
        self.mean_loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.process_time() - begin)

    @torch.no_grad()
    def measure(self, rows: Tensor) -> float:
        return statistics.fmean(float(self.mean_loss(part)) for part in rows.split(32))


def read(path: Path, tokens: int) -> tuple[Tensor, Tensor]:
    """Rows of LENGTH + 1 ids: at least `tokens` for training, and those that are held out."""
    text, tokenizer = path.read_text(encoding="utf-8"), bundled()
    cut = int(len(text) * 0.95)
    train, held = (
        torch.tensor(tokenizer.encode(part)) for part in (text[: min(cut, 6 * tokens)], text[cut:][:400_000])
    )
    rows, held = (ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1) for ids in (train, held))
    if rows.numel() < tokens or len(held) < HELD_OUT:
        raise SystemExit(f"{path} holds too little text for {tokens:,} tokens and {HELD_OUT} rows held out")
    return rows, held[:HELD_OUT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--adamw-lr", type=float, default=2e-3)
    parser.add_argument("--muon-lr", type=float, default=2e-2)
    parser.add_argument("--muon-factor", type=float, default=1.0, help="adamw_lr_factor of muon")
    parser.add_argument("--quick", action="store_true", help="three steps of one seed, to try the script")
    given = parser.parse_args()
    if not given.data.is_file():
        parser.error(f"{given.data}: no such file; give a text with --data")
    steps, seeds = (3, given.seeds[:1]) if given.quick else (given.steps, given.seeds)
    rates = {
        "adamw": {"lr": given.adamw_lr},
        "muon": {"lr": given.muon_lr, "adamw_lr_factor": given.muon_factor},
    }
    rows, held = read(given.data, steps * ROWS * (LENGTH + 1))
    losses: dict[str, list[float]] = {name: [] for name in given.arms}
    seconds: dict[str, list[float]] = {name: [] for name in given.arms}
    for seed in seeds:
        arms = {name: Trained(name, seed, steps, rates) for name in given.arms}
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        for step, chosen in enumerate(order[: steps * ROWS].view(steps, ROWS)):
            for name in list(arms)[:: 1 if step % 2 else -1]:
                arms[name].step(rows[chosen])
        for name, arm in arms.items():
            losses[name].append(arm.measure(held))
            seconds[name].append(statistics.median(arm.seconds))
        print(f"seed {seed}: " + ", ".join(f"{name} {found[-1]:.4f}" for name, found in losses.items()), flush=True)
    print(f"{machine()}; {steps} steps of {ROWS} x {LENGTH} tokens, seeds {seeds}; {rates}")
    print("| arm | parameters | held-out loss | spread | against | difference, each seed | time of a step |")
    print("|---|---|---|---|---|---|---|")
    first = statistics.median(seconds[given.arms[0]])
    for name in given.arms:
        base, mean = ARMS[name].base, statistics.fmean(losses[name])
        spread = max(losses[name]) - min(losses[name])
        differences = [a - b for a, b in zip(losses[name], losses.get(base, losses[name]), strict=True)]
        listed = "" if base == name else " ".join(f"{value:+.3f}" for value in differences)
        ratio = statistics.median(seconds[name]) / first
        parameters = f"{arms[name].model.num_parameters / 1e6:.2f}M"
        against = "" if base == name else base
        print(f"| {name} | {parameters} | {mean:.3f} | {spread:.3f} | {against} | {listed} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
