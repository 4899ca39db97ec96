"""Our decoder against torchtune's carrying the same attention and FFN: import, train step, memory, decode.

    python benchmarks/skeleton.py [--quick]

torchtune's side is its TransformerDecoder, TransformerSelfAttentionLayer, RMSNorm and TiedLinear; attention
(MLA with its latent cache) and FFN are ours on both sides, so that only the skeleton differs. Each figure is
the median of fresh processes, taken in turn, the order turned round in every other round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIDES = ("ours", "torchtune")
VOCAB, DIM, LAYERS, HEADS, SEQ, BATCH = 8192, 256, 8, 4, 256, 4
MLA = {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}


def import_side(side: str) -> None:
    if side == "ours":
        importlib.import_module("plmtune.models.plm")
    else:
        # torchtune 0.6.1 imports one module of torchao from where it stood before.
        moved = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
        sys.modules["torchao.dtypes.nf4tensor"] = moved
        importlib.import_module("torchtune.modules")


def build(side: str, vocab_size: int) -> Any:
    """The model of one side, built of the same attention and FFN."""
    import torch
    from torch import nn

    from plmtune.models.plm import plm
    from plmtune.modules.cache import LayerCache
    from plmtune.registry import component

    torch.manual_seed(0)
    model = plm(
        vocab_size,
        attention=component("attention", "mla", **MLA),
        ffn=component("ffn", "squared_relu", hidden_dim=4 * DIM),
        embed_dim=DIM,
        num_layers=LAYERS,
        num_heads=HEADS,
        max_seq_len=SEQ,
    )
    if side == "ours":
        return model
    from torchtune.modules import RMSNorm, TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

    class Carried(nn.Module):
        """MLA behind torchtune's interface for caches."""

        def __init__(self, mla: Any) -> None:
            super().__init__()
            self.mla, self.cache_enabled, self.length = mla, False, 0
            self.kv_cache: tuple[torch.Tensor, ...] | None = None

        def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
            shapes = self.mla.cache_shapes()
            self.kv_cache = tuple(torch.empty(batch_size, h, max_seq_len, w, dtype=dtype) for h, w in shapes)
            self.cache_enabled = True

        def reset_cache(self) -> None:
            self.length = 0

        def forward(self, x: Any, y: Any, *, mask: Any = None, input_pos: Any = None) -> Any:
            if self.kv_cache is None:
                return self.mla(x, input_pos=input_pos)
            cache, self.length = LayerCache(self.kv_cache, self.length), self.length + x.shape[1]
            return self.mla(x, input_pos=input_pos, cache=cache)

    embeddings = model.tok_embeddings
    layers = [
        TransformerSelfAttentionLayer(Carried(layer.attention), layer.ffn, sa_norm=RMSNorm(DIM), mlp_norm=RMSNorm(DIM))
        for layer in model.layers
    ]
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=SEQ,
        num_heads=HEADS,
        head_dim=MLA["qk_nope_head_dim"] + MLA["qk_rope_head_dim"],
        norm=RMSNorm(DIM),
        output=TiedLinear(embeddings),
    )


def measure_import(side: str) -> float:
    start = time.perf_counter()
    import_side(side)
    return time.perf_counter() - start


def measure_train(side: str, dtype: str, steps: int) -> tuple[float, float]:
    """Seconds a step (forward, loss, backward) and peak memory above the built model, MB."""
    import torch
    import torch.nn.functional as F

    import_side(side)
    model = build(side, VOCAB)
    tokens = torch.randint(VOCAB, (BATCH, SEQ))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(tokens)
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
        times.append(time.perf_counter() - start)
        for parameter in model.parameters():
            parameter.grad = None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return statistics.median(times), (peak - before) / 1024


def measure_decode(side: str, steps: int) -> float:
    """Tokens a second over a cache of SEQ / 2 tokens."""
    import torch

    import_side(side)
    model = build(side, 512).eval()
    tokens = torch.randint(512, (1, SEQ // 2))
    token = tokens[:, :1]
    forward: Callable[[Any, int], Any]
    if side == "ours":
        cache = model.new_cache(1, SEQ)

        def forward(ids: Any, position: int) -> Any:
            return model(ids, cache=cache)
    else:
        model.setup_caches(batch_size=1, dtype=torch.float32)
        mask = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()

        def forward(ids: Any, position: int) -> Any:
            positions = torch.arange(position, position + ids.shape[1])[None]
            return model(ids, mask=mask[positions], input_pos=positions)

    times = []
    with torch.no_grad():
        forward(tokens, 0)
        for step in range(steps):
            start = time.perf_counter()
            forward(token, SEQ // 2 + step)
            times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def child(side: str, what: str, steps: int, threads: int) -> None:
    if what != "import":
        import torch

        torch.set_num_threads(threads)
    if what == "import":
        result: list[float] = [measure_import(side)]
    elif what == "decode":
        result = [measure_decode(side, steps)]
    else:
        result = list(measure_train(side, what, steps))
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, two steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "WHAT", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, what, steps = arguments.child
        child(side, what, int(steps), arguments.threads)
        return
    rounds, steps = (1, 2) if arguments.quick else (3, 4)
    rows = {"import": ["import, s"], "decode": ["decode, tokens/s"]}
    rows |= {dtype: [f"train step {dtype}, s", f"train memory {dtype}, MB"] for dtype in ("fp32", "bf16")}
    from side_by_side import machine

    print(machine())
    print(f"{LAYERS} layers of {DIM}, train {BATCH} x {SEQ} tokens, {arguments.threads} thread(s)\n")
    print("| | ours | torchtune | ratio |\n|---|---|---|---|")
    for what, labels in rows.items():
        found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for number in range(rounds):
            for side in SIDES[:: 1 if number % 2 == 0 else -1]:
                count = str(steps * 20 if what == "decode" else steps)
                options = ["--threads", str(arguments.threads), "--child", side, what, count]
                done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
        for index, label in enumerate(labels):
            ours, theirs = (statistics.median(run[index] for run in found[side]) for side in SIDES)
            ratio = ours / theirs if what == "decode" else theirs / ours
            print(f"| {label} | {ours:.3g} | {theirs:.3g} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
