"""Held-out bits per byte on tinyshakespeare: a PLM through our recipe against a plain GPT, in one run.

The GPT is nanoGPT's CPU preset written plainly (4 layers of 128, 4 heads, learned positions, GELU, AdamW, cosine,
2,000 steps of 12 x 64 characters; its README reports 1.88 nats a character, 2.71 bits a byte). Ours has the same
depth, width and tokens a step, takes fewer steps, and reads through a BPE of 1,024 tokens trained on the same 90%.
Both train on the first 90% of the file and are measured on all of the last 10%. Times are of training alone; the two
take turns in `--rounds` and medians are compared.

    python benchmarks/tinyshakespeare.py --data ../shared/data/pretrain/tinyshakespeare.txt
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import machine
from torch import Tensor, nn

from plmtune.config import compose
from plmtune.io.metrics import read
from plmtune.tokenizers.train_bpe import train_bpe

STEPS, BATCH, LENGTH = 2000, 12, 64
OUR_STEPS = 1100  # a PLM step takes longer than a GPT step; this many take less time than the GPT's 2,000


class Block(nn.Module):
    """GPT-2's block without dropout and biases, as the preset has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, d)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocab: int, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def baseline(text: bytes, steps: int) -> tuple[float, float]:
    """(bits per byte of the last 10%, seconds of training) of the plain GPT."""
    torch.manual_seed(1337)
    cut = int(len(text) * 0.9)
    vocab = {byte: index for index, byte in enumerate(sorted(set(text)))}
    data = torch.tensor([vocab[byte] for byte in text])
    train, held = data[:cut], data[cut:]
    model = GPT(len(vocab))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(1337)
    began = time.perf_counter()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 100) / (steps - 100)))
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (step + 1) / 101) * (1e-4 + 9e-4 * cosine)
        starts = torch.randint(len(train) - LENGTH - 1, (BATCH,), generator=generator)
        rows = torch.stack([train[i : i + LENGTH + 1] for i in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    rows = held[: (len(held) - 1) // LENGTH * LENGTH + 1]
    with torch.no_grad():
        logits = [model(chunk) for chunk in rows[:-1].view(-1, LENGTH).split(256)]
        nats = F.cross_entropy(torch.cat(logits).flatten(0, 1), rows[1:])
    return float(nats) / math.log(2), seconds


def ours(path: Path, steps: int, overrides: list[str]) -> tuple[float, float]:
    """The same of the recipe, run as ``plmtune run pretrain benchmarks/tinyshakespeare.yaml``."""
    overlay = Path(__file__).with_suffix(".yaml")
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        train_bpe([text[: int(len(text) * 0.9)]], 1024).save(Path(directory) / "tokenizer")
        cfg = compose.compose(
            "pretrain",
            [str(overlay)],
            [
                f"data.paths=[{path}]",
                f"tokenizer.path={directory}/tokenizer",
                f"run_dir={directory}/run",
                f"preparation.directory={directory}/data",
                f"phases=[{{name: main, steps: {steps}}}]",
                *overrides,
            ],
        )
        importlib.import_module("plmtune.recipes.pretrain").main(cfg)
        entries = read(Path(directory) / "run" / "metrics.jsonl")
    return (
        [entry for entry in entries if "bits_per_byte" in entry][-1]["bits_per_byte"],
        [entry for entry in entries if "time" in entry][-1]["time"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/pretrain/tinyshakespeare.txt"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of 200 steps, to try the script")
    parser.add_argument("overrides", nargs="*", help="further overrides for our side, key=value")
    options = parser.parse_args()
    if not options.data.is_file():
        parser.error(f"{options.data}: no such file; give tinyshakespeare.txt with --data")
    rounds, steps, our_steps = (1, 200, 110) if options.quick else (options.rounds, STEPS, OUR_STEPS)
    path = options.data.resolve()
    results: dict[str, list[tuple[float, float]]] = {"plain GPT": [], "plmtune PLM": []}
    for number in range(rounds):
        order = list(results) if number % 2 == 0 else list(results)[::-1]
        for name in order:
            result = (
                baseline(path.read_bytes(), steps) if name == "plain GPT" else ours(path, our_steps, options.overrides)
            )
            results[name].append(result)
    print(machine())
    print(
        f"{'':12} bits/byte   seconds   ({steps} and {our_steps} steps of {BATCH} x {LENGTH} tokens, {rounds} rounds)"
    )
    medians = {
        name: [statistics.median(column) for column in zip(*pairs, strict=True)] for name, pairs in results.items()
    }
    for name, (bits, seconds) in medians.items():
        print(f"{name:12} {bits:9.3f} {seconds:9.1f}")
    (bits_gpt, seconds_gpt), (bits_plm, seconds_plm) = medians.values()
    print(f"ratio PLM/GPT {bits_plm / bits_gpt:8.3f} {seconds_plm / seconds_gpt:9.3f}")


if __name__ == "__main__":
    main()
