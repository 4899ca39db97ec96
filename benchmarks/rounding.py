"""How far log-probabilities of the same answers are apart between batches of other shapes, in bf16 and fp32.

    python benchmarks/rounding.py MODEL_DIR pairs.json [--pairs 12] [--seq-len 512]
    python benchmarks/rounding.py MODEL_DIR pairs.json --first-loss [--isa AVX2] [--pairs 4] [--losses dpo ...]

For each comparison h = log p(chosen) - log p(rejected) is computed alone in a batch, two in one row, and two rows in a
batch. Printed: the root mean square and the mean of the differences of h to that alone.

With --first-loss each loss trains for one step of all pairs at a rate of 1e-9. Printed: its first loss, what theory
says of a model that is its reference, and their difference. --isa hides newer instructions from oneDNN and ATen: with
AVX2 the CPU has no bf16 units.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from side_by_side import machine
from torch import Tensor

import plmtune
from plmtune.data.chat_template import find_template
from plmtune.data.comparisons import Comparison, make_batch, make_comparisons
from plmtune.data.preferences import preferences
from plmtune.modules.decoder import Decoder
from plmtune.training.compare import answers

GROUPS = {
    "alone": lambda num: [[[i]] for i in range(num)],
    "two in a row": lambda num: [[[i, i + 1]] for i in range(0, num, 2)],
    "two rows": lambda num: [[[i], [i + 1]] for i in range(0, num, 2)],
}


# At the reference, with each loss's own defaults.
THEORY = {
    "dpo": math.log(2),
    "ipo": (1 / (2 * 0.1)) ** 2,
    "kto": 2 * 0.5,  # both answers of a pair
    "aries": 0.2 * math.log(2) + 0.8 * 2 * 0.25,
}


def first_loss(model: Path, data: str, loss: str, precision: str, pairs: int, seq_len: int, isa: str | None) -> float:
    """The loss of the only step of a run."""
    hidden = {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": isa.lower()} if isa else {}
    with tempfile.TemporaryDirectory() as place:
        words = [
            f"init_from={model.resolve()}",
            f"data.paths=[{Path(data).resolve()}]",
            f"data.max_rows={pairs}",
            f"loss={loss}",
            f"runtime.precision={precision}",
            f"seq_len={seq_len}",
            f"global_batch_size={pairs}",
            "micro_batch_size=2",
            "chat.holdout=0",
            "optimizer.lr=1e-9",
            f"run_dir={place}/run",
            f"reference_cache={place}/reference",
        ]
        command = [sys.executable, "-m", "plmtune", "run", "dpo", *words]
        subprocess.run(command, check=True, env=os.environ | hidden, capture_output=True)
        lines = (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()
    return float(next(entry["loss"] for entry in map(json.loads, lines) if "loss" in entry))


@torch.no_grad()
def differences(
    model: Decoder, compared: list[Comparison], groups: list[list[list[int]]], dtype: torch.dtype
) -> Tensor:
    """h of each comparison, [n]."""
    out = torch.zeros(len(compared), 2)
    for rows in groups:
        batch = make_batch(compared, rows)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out[batch.index] = answers(model, model, batch, scores=False).view(-1, 2)
    return out[:, 0] - out[:, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--first-loss", action="store_true")
    parser.add_argument("--isa")
    parser.add_argument("--losses", nargs="+", default=list(THEORY), choices=list(THEORY))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    arguments = parser.parse_args()
    if arguments.first_loss:
        print(f"{machine()}; --isa {arguments.isa}")
        for precision in arguments.precisions:
            for loss in arguments.losses:
                how = (arguments.pairs or 4, arguments.seq_len, arguments.isa)
                value, theory = first_loss(arguments.model, arguments.data, loss, precision, *how), THEORY[loss]
                print(f"{loss}, {precision}: {value:.7f}, theory {theory:.7f}, {value - theory:+.1g}", flush=True)
        return
    model, tokenizer = plmtune.load(arguments.model, "cpu", torch.float32)
    template = find_template(None, tokenizer)
    pairs = preferences((arguments.data,)).pairs(skip_bad=True)
    compared = make_comparisons(pairs, template, None, arguments.seq_len)[0][: (arguments.pairs or 12) // 2 * 2]
    tokens = sum(comparison.num_tokens for comparison in compared) / len(compared)
    print(f"{machine()}; {len(compared)} comparisons of {tokens:,.0f} tokens")
    for dtype in (torch.bfloat16, torch.float32):
        found = {name: differences(model, compared, make(len(compared)), dtype) for name, make in GROUPS.items()}
        for name in list(GROUPS)[1:]:
            apart = found[name] - found["alone"]
            print(f"{dtype}, {name}: rms {apart.pow(2).mean().sqrt():.2g}, mean {apart.mean():+.2g}", flush=True)


if __name__ == "__main__":
    main()
