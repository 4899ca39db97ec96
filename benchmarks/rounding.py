"""How far log-probabilities of the same answers are apart between batches of other shapes, in bf16 and fp32.

    python benchmarks/rounding.py MODEL_DIR pairs.json [--pairs 12] [--seq-len 512]
    python benchmarks/rounding.py MODEL_DIR pairs.json --first-loss [--isa AVX512_CORE] [--pairs 2]

For each comparison h = log p(chosen) - log p(rejected) is computed alone in a batch, two in one row, and two rows in a
batch. Printed: the root mean square and the mean of the differences of h to that alone.

With --first-loss each loss trains for one step of the file's shortest pairs. Printed is a table of the first losses in
bf16 and fp32 beside what theory says of a model that is its reference. --isa hides newer instructions from oneDNN: with
AVX512_CORE or AVX2 the CPU has no bf16 units.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine
from torch import Tensor

import plmtune
from plmtune.data.preferences import preferences
from plmtune.modules.decoder import Decoder
from plmtune.preference.comparisons import Comparison, make_batch, make_comparisons
from plmtune.preference.scorer import answer_scores
from plmtune.tokenizers.chat_template import find_template

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


def first_loss(model: Path, rows: list[Any], loss: str, precision: str, isa: str | None) -> float:
    """The loss of the only step of a run, which is ended there: its checkpoint would take most of the time."""
    hidden = {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "pairs.json").write_text(json.dumps(rows))
        words = [
            f"init_from={model.resolve()}",
            f"data.paths=[{place}/pairs.json]",
            f"loss={loss}",
            f"runtime.precision={precision}",
            "seq_len=512",
            f"global_batch_size={len(rows)}",
            "micro_batch_size=2",
            "chat.holdout=0",
            f"run_dir={place}/run",
            f"reference_cache={place}/reference",
        ]
        command = [sys.executable, "-m", "plmtune", "run", "dpo", *words]
        logged, said = Path(place) / "run" / "metrics.jsonl", Path(place) / "said"
        with (
            said.open("w") as file,
            subprocess.Popen(command, env=os.environ | hidden, stdout=file, stderr=file) as process,
        ):
            while not (found := losses(logged)) and process.poll() is None:
                time.sleep(0.2)
            process.kill()
        if not found:
            raise SystemExit(said.read_text())
    return found[0]


def losses(logged: Path) -> list[float]:
    """What a run has logged by now."""
    lines = logged.read_text().split("\n")[:-1] if logged.exists() else []
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@torch.no_grad()
def differences(
    model: Decoder, compared: list[Comparison], groups: list[list[list[int]]], dtype: torch.dtype
) -> Tensor:
    """h of each comparison, [n]."""
    out = torch.zeros(len(compared), 2)
    for rows in groups:
        batch = make_batch(compared, rows)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out[batch.index] = answer_scores(model, model, batch, scalar_head=False).view(-1, 2)
    return out[:, 0] - out[:, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--first-loss", action="store_true")
    parser.add_argument("--isa")
    arguments = parser.parse_args()
    if arguments.first_loss:
        rows, isa = json.loads(Path(arguments.data).read_text(encoding="utf-8")), arguments.isa
        rows = sorted(rows, key=lambda row: len(json.dumps(row)))[: arguments.pairs or 2]
        print(f"{machine()}; {len(rows)} pairs; oneDNN {f'up to {isa}' if isa else 'uses all that the CPU has'}\n")
        print("| loss | theory | bf16 | fp32 |\n|---|---|---|---|")
        for loss, theory in THEORY.items():
            bf16, fp32 = (first_loss(arguments.model, rows, loss, precision, isa) for precision in ("bf16", "fp32"))
            print(f"| `{loss}` | {theory:.7f} | {bf16:.7f} | {fp32:.7f} |", flush=True)
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
