"""How far log-probabilities of the same answers are apart between batches of other shapes, in bf16 and fp32.

    python benchmarks/rounding.py MODEL_DIR pairs.json [--pairs 12] [--seq-len 512]

For each comparison h = log p(chosen) - log p(rejected) is computed alone in a batch, two in one row, and two rows in a
batch. Printed: the root mean square and the mean of the differences of h to that alone.
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=512)
    arguments = parser.parse_args()
    model, tokenizer = plmtune.load(arguments.model, "cpu", torch.float32)
    template = find_template(None, tokenizer)
    pairs = preferences((arguments.data,)).pairs(skip_bad=True)
    compared = make_comparisons(pairs, template, None, arguments.seq_len)[0][: arguments.pairs // 2 * 2]
    tokens = sum(comparison.num_tokens for comparison in compared) / len(compared)
    print(f"{machine()}; {len(compared)} comparisons of {tokens:,.0f} tokens")
    for dtype in (torch.bfloat16, torch.float32):
        found = {name: differences(model, compared, make(len(compared)), dtype) for name, make in GROUPS.items()}
        for name in list(GROUPS)[1:]:
            apart = found[name] - found["alone"]
            print(f"{dtype}, {name}: rms {apart.pow(2).mean().sqrt():.2g}, mean {apart.mean():+.2g}", flush=True)


if __name__ == "__main__":
    main()
