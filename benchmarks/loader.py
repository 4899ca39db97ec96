"""Training steps with real data against steps with one cached batch: what the loader costs.

    python benchmarks/loader.py            about three minutes on two cores
    python benchmarks/loader.py --quick

Model, optimizer, batch and text are the demo's (conf/demo.yaml). Each round runs some steps of every side, its
order turned round in every other one; a round's ratio is the rate of its steps with real data over the rate of its
steps with the cached batch, and the median of the rounds counts. "alone" is the time that a step's batches and the
running hash of the order take when nothing is trained. The bar is a ratio of 0.98.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine

from plmtune.config import compose
from plmtune.data.batches import Batch, Batches, Phase
from plmtune.data.prepare import prepare
from plmtune.data.shards import Shards, open_windows
from plmtune.data.sources import named_sources

SIDES = {"cached batch": None, "num_workers=0": 0, "num_workers=2": 2}


def open_demo(cfg: Any, tokenizer: Any, directory: Path) -> dict[str, Shards]:
    """Prepare the demo's text, or find it prepared."""
    sources = named_sources(compose.build("data", cfg.data))
    return {name: Shards.open(prepare(source, tokenizer, directory)) for name, source in sources.items()}


def trainer(cfg: Any, tokenizer: Any) -> Callable[[list[Batch]], None]:
    """Return a function that takes one optimizer step, as the recipe does on one process in fp32."""
    torch.manual_seed(0)
    model = compose.build("model", cfg.model, vocab_size=tokenizer.vocab_size)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = compose.build("optimizer", cfg.optimizer, model=model)
    loss_sum = compose.build("loss", cfg.loss)

    def update(batches: list[Batch]) -> None:
        num_valid = sum(batch.num_valid for batch in batches)
        for batch in batches:
            hidden = model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)
            (loss_sum(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten()) / num_valid).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def seconds(update: Callable[[list[Batch]], None], data: Batches, start: int, steps: int, *, real: bool) -> float:
    """Seconds of `steps` steps from `start`, behind one that is not counted."""
    if not real:
        cached = data.step(start)
        update(cached)
        begin = time.perf_counter()
        for _ in range(steps):
            update(cached)
        return time.perf_counter() - begin
    iterator = data.iterate(start)
    update(next(iterator)[1])
    digest = ""
    begin = time.perf_counter()
    for _ in range(steps):
        step, batches = next(iterator)
        update(batches)
        digest = data.order_digest(digest, step)
    taken = time.perf_counter() - begin
    iterator.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="where the text is or will be prepared")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds, steps = (5, 2) if options.quick else (15, 8)
    cfg = compose.compose("demo", (), [])
    tokenizer = compose.build("tokenizer", cfg.tokenizer)
    shards = open_demo(cfg, tokenizer, options.data)
    train, _ = open_windows(shards, cfg.seq_len, document_mask=cfg.document_mask)
    update = trainer(cfg, tokenizer)

    def loader(num_workers: int) -> Batches:
        return Batches(
            train,
            [Phase("main", 100_000)],
            global_batch_size=cfg.global_batch_size,
            micro_batch_size=cfg.micro_batch_size,
            seed=cfg.seed,
            num_workers=num_workers,
        )

    alone = loader(0)
    digest, begin = "", time.perf_counter()
    for step in range(1000):
        alone.step(step)
        digest = alone.order_digest(digest, step)
    alone_ms = time.perf_counter() - begin  # a thousand steps: seconds are milliseconds a step

    loaders = {side: loader(workers or 0) for side, workers in SIDES.items()}
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            real = SIDES[side] is not None
            taken[side].append(seconds(update, loaders[side], number * (steps + 1), steps, real=real))
    tokens = steps * cfg.global_batch_size * cfg.seq_len
    base = taken["cached batch"]
    print(machine())
    print(f"{cfg.global_batch_size} sequences of {cfg.seq_len} tokens a step; {rounds} rounds of {steps} steps a side")
    share = alone_ms / 1e3 * steps / statistics.median(base)
    print(f"the loader alone: {alone_ms:.2f} ms a step, {share:.2%} of a step\n")
    print("| data | tokens/s | ratio | its range |\n|---|---|---|---|")
    for side, times in taken.items():
        ratios = [cached / own for cached, own in zip(base, times, strict=True)]
        rate = tokens / statistics.median(times)
        print(f"| {side} | {rate:,.0f} | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")


if __name__ == "__main__":
    main()
