"""Our train step against a plain transformers loop over an equal model.

    python benchmarks/train_step.py            about two minutes on two cores
    python benchmarks/train_step.py --quick

transformers has no PLM; the peer is its DeepSeek-V3, dense, with hidden_act="relu". That computes
relu(gate) * up, which is PLM's relu(up)^2 where gate = up: three matrices to our two. So it gets two thirds
of our hidden width, which makes parameters and FLOPs equal. Both take the same tokens in fp32 through
forward, loss, backward, clipping and AdamW (ours fused, the loop's torch's default), each side in a process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.plm import plm
from plmtune.optim.optimizers import adamw
from plmtune.registry import component
from plmtune.training.runtime import peak_memory_bytes

CPU = torch.device("cpu")
SIDES = ("plmtune", "transformers")
VOCAB, WIDTH, LAYERS, HEADS, HIDDEN = 8192, 256, 6, 4, 1152
LATENT, NOPE, ROPE, VALUE = 64, 48, 16, 64


def ours() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor, Tensor], Tensor]]:
    widths = {"kv_lora_rank": LATENT, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
    model = plm(
        VOCAB,
        attention=component("attention", "mla", **widths),
        ffn=component("ffn", "squared_relu", hidden_dim=HIDDEN),
        embed_dim=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        max_seq_len=1024,
    )
    loss_sum = cross_entropy()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = model(inputs, hidden=True).flatten(0, 1)
        return loss_sum(hidden, model.head_weight, targets.flatten()) / targets.numel()

    return model, adamw(model), loss


def theirs() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor, Tensor], Tensor]]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN * 2 // 3,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,  # no mixture of experts
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        hidden_act="relu",
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: Any = DeepseekV3ForCausalLM(config)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return model, torch.optim.AdamW(model.parameters(), lr=3e-4), loss


def one_side(side: str, batch: int, seq_len: int, steps: int) -> None:
    """Run in a child: print tokens/s of the median step, the peak and the parameters."""
    torch.manual_seed(0)
    model, optimizer, loss_of = ours() if side == "plmtune" else theirs()
    model.train()
    tokens = torch.randint(VOCAB, (batch, seq_len + 1))
    times = []
    for _ in range(steps + 2):  # two to warm up
        start = time.perf_counter()
        loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    rate = batch * seq_len / statistics.median(times[2:])
    count = sum(p.numel() for p in model.parameters())
    print(json.dumps({"rate": rate, "peak": peak_memory_bytes(CPU), "parameters": count}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Our train step against a plain transformers loop.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", choices=SIDES, help="internal: run one side in this process")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    batch, seq_len, steps, rounds = (2, 256, 3, 1) if options.quick else (4, 512, 6, 4)
    torch.set_num_threads(options.threads)
    if options.side:
        one_side(options.side, batch, seq_len, steps)
        return
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{batch} sequences of {seq_len} tokens, fp32")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for index in range(rounds):
        for side in SIDES if index % 2 == 0 else reversed(SIDES):
            command = [sys.executable, __file__, "--side", side, "--threads", str(options.threads)]
            command += ["--quick"] if options.quick else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  {side:<13} {found[side][-1]['rate']:,.0f} tokens/s", flush=True)
    middle = {side: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for side, rows in found.items()}
    print("| loop | tokens/s | peak MiB | parameters |\n|---|---|---|---|")
    for side, row in middle.items():
        print(f"| {side} | {row['rate']:,.0f} | {row['peak'] / 2**20:.0f} | {row['parameters']:,.0f} |")
    rate, peak = (middle["plmtune"][key] / middle["transformers"][key] for key in ("rate", "peak"))
    print(f"| ratio | {rate:.2f} | {peak:.2f} | |")


if __name__ == "__main__":
    main()
