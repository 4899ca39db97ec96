"""A teacher as it is and quantized for distillation: bytes of its weights, loss, and the divergence between both.

    python benchmarks/quantized_teacher.py MODEL TEXT.txt            4,096 tokens of the text, bf16 where the CPU has it
    python benchmarks/quantized_teacher.py MODEL TEXT.txt --tokens 1024

KL is from the teacher as it is; "seconds" the time of a forward of all tokens, the least of two.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from plmtune.config.sections import DistillationConfig
from plmtune.models.adapters import load_model, load_model_tokenizer
from plmtune.modules.decoder import Decoder
from plmtune.quantization.quantize import quantize
from plmtune.training.estimate import stored_bytes
from plmtune.training.teacher import quantized_formats

_ROW = 512


def log_probs(model: Decoder, rows: Tensor) -> tuple[list[Tensor], float]:
    """Log-probabilities of each row's tokens, and the time of a forward of all rows."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        hidden = model(rows, hidden=True)
        best = min(best, time.perf_counter() - start)
    return [F.log_softmax(model.logits(row), dim=1) for row in hidden], best


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    tokenizer = load_model_tokenizer(options.model)
    ids = torch.tensor(tokenizer.encode(options.text.read_text(encoding="utf-8")[: 8 * options.tokens]))
    rows = ids[: options.tokens // _ROW * _ROW].view(-1, _ROW)
    print(f"{rows.numel():,} tokens, {options.dtype}\n| teacher | weights MiB | nats a token | KL | seconds |")
    print("|---|---|---|---|---|")
    reference: list[Tensor] = []
    schemes: tuple[Literal["int8"] | None, ...] = (None, "int8")
    for scheme in schemes:
        model = load_model(options.model, dtype=dtype).eval()
        if scheme:
            quantize(
                model, quantized_formats(model, DistillationConfig(teacher=str(options.model), quantization=scheme))
            )
        found, seconds = log_probs(model, rows)
        reference = reference or found
        loss = sum(F.nll_loss(p[:-1], row[1:]).item() for p, row in zip(found, rows, strict=True)) / len(rows)
        kl = sum(
            F.kl_div(q, p, reduction="batchmean", log_target=True).item() for p, q in zip(reference, found, strict=True)
        ) / len(rows)
        size = stored_bytes(model, dtype) / 2**20
        print(f"| {scheme or options.dtype} | {size:.0f} | {loss:.4f} | {kl:.5f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
