"""Decoding one token: ours in bf16, int8, int4, dense and skipping zeros (llamacpp.py compares with llama.cpp).

    python benchmarks/edge_decode.py [--models plm_100m] [--contexts 128,2048,4096] [--threads 2] [--json F] [--plot F]

plm_100m   13 layers of 768, 16 heads whose keys and values are 8.9 times their latent, as PLM's are
plm_1.8b   PLM-1.8B's layer, four times, with a vocabulary of 32,000

Weights are random, with zeros as trained ones have them: a feature that all tokens share is weighed against in each
`up`, so that 90% of squared ReLU's outputs are zero (--sparsity); what the timed steps had is counted and printed.
Tokens are random, read and written; some of them are read and fill the cache over and over. All models are open at once
and take turns; every other round reverses the order, so that ratios hold on a busy machine, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from side_by_side import machine
from torch import Tensor

from plmtune.devices.sparse_decode import squared_relus, switch
from plmtune.inference.kernel_choice import prepack
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.quantization import schemes
from plmtune.quantization.quantize import quantize
from plmtune.registry import component

VOCABULARY = 32000
TEXT = 256  # tokens by which zeros are made, and others that caches are filled with
# (numerator, denominator), the bars of the project
RATIOS = (("int4", "bf16"), ("bf16 sparse", "bf16"))
LINES = {"bf16": "-", "int8": "--", "int4": ":", "bf16 sparse": "-."}


def build(name: str, longest: int) -> Decoder:
    torch.manual_seed(0)
    if name == "plm_1.8b":
        return plm(VOCABULARY, num_layers=4, max_seq_len=longest)
    return plm(
        VOCABULARY,
        attention=component(
            "attention", "mla", kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        ffn=component("ffn", "squared_relu", hidden_dim=3072),
        embed_dim=768,
        num_layers=13,
        num_heads=16,
        max_seq_len=longest,
    )


@torch.no_grad()
def make_sparse(model: Decoder, share: float) -> float:
    """Shift each `up` until this share of its outputs is negative; return the share of zeros on other tokens.

    The first feature is one large number for all tokens, which no layer adds to, so that one number for each `up`, its
    weight, is all that is fitted.
    """
    embeddings = model.tok_embeddings.weight
    embeddings[:, 0] = embeddings.std() * model.embed_dim**0.5
    for layer in model.layers:
        cast(Any, layer).attention.o_proj.weight[0] = 0
    ffns = squared_relus(model)
    for ffn in ffns.values():
        ffn.down_proj.weight[0] = 0
    text, other = torch.randint(model.vocab_size, (2, 1, TEXT))
    for ffn in ffns.values():
        seen: list[Tensor] = []
        hook = ffn.up_proj.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0][0]))
        model(text, hidden=True)
        hook.remove()
        (x,) = seen
        places = (ffn.up_proj(x) / x[:, :1]).flatten()
        ffn.up_proj.weight[:, 0] -= places.kthvalue(max(round(share * len(places)), 1)).values
    with recording(model):
        model(other, hidden=True)
        return zeros(model)


@contextmanager
def recording(model: Decoder) -> Iterator[None]:
    """Have each FFN keep its share of zeros meanwhile."""
    ffns = squared_relus(model).values()
    for ffn in ffns:
        ffn.record_sparsity = True
    yield
    for ffn in ffns:
        ffn.record_sparsity = False


def zeros(model: Decoder) -> float:
    """Mean share of zeros of what was read last."""
    return statistics.fmean(float(cast(Tensor, ffn.sparsity).mean()) for ffn in squared_relus(model).values())


class Ours:
    """One of our variants with a cache that some random tokens fill over and over."""

    @torch.inference_mode()
    def __init__(self, model: Decoder, longest: int) -> None:
        self.model, self.cache, self.random = model, model.new_cache(1, longest), torch.Generator()
        read = min(TEXT, longest)
        model(torch.randint(model.vocab_size, (1, read)), cache=self.cache, hidden=True)
        for layer in self.cache.layers:
            for buffer in layer:
                for begin in range(read, longest, read):
                    buffer[:, :, begin : begin + read] = buffer[:, :, : min(read, longest - begin)]

    def start(self, context: int) -> None:
        self.cache.length = context
        self.random.manual_seed(context)

    @torch.inference_mode()
    def step(self) -> None:
        # Not the likeliest, which may be one token again and again, whose few columns a CPU's cache would hold.
        token = torch.randint(self.model.vocab_size, (1, 1), generator=self.random)
        self.model.logits(self.model(token, cache=self.cache, hidden=True)[:, -1:]).argmax(-1)

    def zeros(self, context: int, steps: int) -> float:
        """Share of zeros in the first steps after so many tokens, which are those that were timed."""
        self.start(context)
        shares = []
        with recording(self.model):
            for _ in range(steps):
                self.step()
                shares.append(zeros(self.model))
        return statistics.fmean(shares)


def variants(model: Decoder, longest: int) -> dict[str, Ours]:
    """Everything that is compared, with one model's weights."""
    found: dict[str, Ours] = {}
    model.requires_grad_(False).eval()
    for scheme in ("int8", "int4"):
        held = copy.deepcopy(model).to(torch.bfloat16)
        quantize(held, getattr(schemes, scheme)(held))
        prepack(held)
        found[scheme] = Ours(held, longest)
    dense = model.to(torch.bfloat16)
    sparse = copy.deepcopy(dense)
    switch(sparse, True)
    for held in (dense, sparse):
        prepack(held)  # as `plmtune.load` does
    return {"bf16": Ours(dense, longest), "bf16 sparse": Ours(sparse, longest), **found}


def alternate(steps: dict[str, Callable[[], None]], rounds: int, tokens: int) -> dict[str, float]:
    """Median seconds a token of each, over rounds in which each writes some tokens."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            time.sleep(0.02)  # threads of the one before have stopped waiting for work
            steps[name]()
            for _ in range(tokens):
                start = time.perf_counter()
                steps[name]()
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def run(name: str, contexts: Sequence[int], arguments: argparse.Namespace) -> dict[str, object]:
    longest = max(contexts) + arguments.rounds * (arguments.tokens + 1) + 1
    model = build(name, max(longest, TEXT))
    sparsity = make_sparse(model, arguments.sparsity)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"\n{name}: {parameters / 1e6:.0f}M parameters, {sparsity:.1%} zeros on tokens that they were not made by\n",
        flush=True,
    )
    speeds: dict[str, dict[str, float]] = {}
    shares: dict[str, float] = {}
    compared = variants(model, longest)
    for context in contexts:
        for variant in compared.values():
            variant.start(context)
        seconds = alternate(
            {key: variant.step for key, variant in compared.items()}, arguments.rounds, arguments.tokens
        )
        speeds[str(context)] = {key: 1 / value for key, value in seconds.items()}
        steps = arguments.rounds * (arguments.tokens + 1)
        shares[str(context)] = compared["bf16 sparse"].zeros(context, steps)
    show(speeds, shares)
    return {"parameters": parameters, "sparsity": shares, "tokens_per_second": speeds}


def show(speeds: dict[str, dict[str, float]], shares: dict[str, float]) -> None:
    print("| tokens/s at context | " + " | ".join(speeds) + " |\n|" + "---|" * (len(speeds) + 1))
    for key in next(iter(speeds.values())):
        print(f"| {key} | " + " | ".join(f"{found[key]:.1f}" for found in speeds.values()) + " |")
    for over, under in RATIOS:
        if all(over in found and under in found for found in speeds.values()):
            ratios = " | ".join(f"{found[over] / found[under]:.2f}x" for found in speeds.values())
            print(f"| {over} / {under} | {ratios} |")
    print("| zeros in the steps of bf16 sparse | " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |")


def draw(results: dict[str, dict[str, object]], path: Path) -> None:
    from plmtune.io.figures import COLOURS, finish, new_figure

    figure, at = new_figure(6 * len(results), 4.5), {}
    for axes, (name, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        speeds = cast(dict[str, dict[str, float]], result["tokens_per_second"])
        contexts = [int(context) for context in speeds]
        for key in next(iter(speeds.values())):
            values = [found[key] for found in speeds.values()]
            axes.plot(contexts, values, color=COLOURS[0], linestyle=LINES[key], marker="o", ms=3, label=key)
        axes.set_title(name, fontsize=10)
        axes.set_xscale("log")
        at[axes.xaxis] = contexts
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel("tokens/s")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, handlelength=3.5)
    finish(figure, path, at=at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="plm_100m,plm_1.8b")
    parser.add_argument("--contexts", default="128,2048,4096")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=6, help="written by each in a round")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    contexts = sorted(map(int, arguments.contexts.split(",")))
    print(machine())
    results = {name: run(name, contexts, arguments) for name in arguments.models.split(",")}
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "models": results}, indent=2) + "\n")
    if arguments.plot:
        draw(results, arguments.plot)


if __name__ == "__main__":
    main()
