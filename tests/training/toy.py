"""A tiny language model with a decoder's interface, and the training loop that recipes write."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plmtune.training.runtime import Runtime

VOCABULARY = 32


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))).square())


class Toy(nn.Module):
    def __init__(self, width: int = 16, depth: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.output = None if tied else nn.Linear(width, VOCABULARY, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def forward(self, tokens: Tensor, *, hidden: bool = False) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x if hidden else x @ self.head_weight.T


def global_batch(step: int, rows: int = 8, seq_len: int = 7) -> tuple[Tensor, Tensor]:
    """Tokens and targets [rows, seq_len], a pure function of step; rows differ in their valid targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (rows, seq_len), generator=generator)
    targets = (tokens * 5 + 1) % VOCABULARY
    targets[torch.rand(rows, seq_len, generator=generator) < torch.linspace(0, 0.8, rows)[:, None]] = -100
    return tokens, targets


def train_step(
    runtime: Runtime, model: Toy, trained: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> tuple[float, float]:
    """One optimizer step of two micro-batches a rank. Returns (mean loss, gradient norm)."""
    tokens, targets = (part.chunk(2 * runtime.world_size) for part in global_batch(step))
    mine = range(2 * runtime.rank, 2 * runtime.rank + 2)
    (num_valid,) = runtime.sum(sum((targets[i] != -100).sum() for i in mine))
    total = torch.zeros((), dtype=torch.float64)
    for i in mine:
        with runtime.accumulate(trained, first=i == mine[0], last=i == mine[-1]), runtime.autocast():
            hidden = trained(tokens[i], hidden=True)
            logits = hidden.flatten(0, 1) @ model.head_weight.T
            loss = F.cross_entropy(logits.float(), targets[i].flatten(), reduction="sum", ignore_index=-100)
        (loss * runtime.gradient_scale / num_valid).backward()
        total += loss.detach()
    norm = runtime.clip_grad_norm(model, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return runtime.sum(total)[0] / num_valid, norm.item()
