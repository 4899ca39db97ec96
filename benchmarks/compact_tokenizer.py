"""Compact tokenizers: what a checkpoint loses when `plmtune tokenizer compress` takes its rows away, without training.

    python benchmarks/compact_tokenizer.py CHECKPOINT TEXT... [--sizes 32768,8192] [--held-out 40000] [--dtype bf16]

The last bytes of each text are held out; tokens are counted on the rest of all texts. For each size the table shows
coverage, the share of embedding and head, tokens of the held-out text against those of the original tokenizer, and
bits a byte, each document read in windows of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

from side_by_side import machine

import plmtune
from plmtune import dtypes
from plmtune.data.token_counts import count_tokens, find_data
from plmtune.evaluation.perplexity import perplexity
from plmtune.models.kept_rows import keep_rows, row_parameters
from plmtune.tokenizers.compress import Compressor, embedding_share

WINDOW = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--sizes", default="32768,16384,8192,4096,2048")
    parser.add_argument("--held-out", type=int, default=40_000, help="bytes of each text")
    parser.add_argument("--dtype", default="fp32")
    given = parser.parse_args()
    print(machine())
    model, tokenizer = plmtune.load(given.checkpoint, "cpu", dtypes.from_name(given.dtype), prepare=False)
    row, others = row_parameters(model.config, given.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        tails, heads = [], []
        for number, path in enumerate(given.texts):
            content = path.read_bytes()
            heads.append(Path(folder) / f"{number}.txt")
            heads[-1].write_bytes(content[: -given.held_out])
            tails.append(content[-given.held_out :].decode(errors="ignore"))
        counted = count_tokens(find_data([str(path) for path in heads], tokenizer))
    compressor = Compressor(tokenizer)
    sizes = [int(size) for size in given.sizes.split(",")]
    order = compressor.order(counted.counts, max(sizes))
    print(f"{counted.tokens:,} tokens counted, {sum(len(tail.encode()) for tail in tails):,} bytes held out")
    names = " | ".join(f"bits a byte, {path.name}" for path in given.texts)
    print(f"| tokens | coverage | embedding and head | parameters | tokens of the text | {names} |")
    print("|---|---|---|---|---|" + "---|" * len(tails))
    before = 0
    for size in (None, *sizes):
        made, smaller = tokenizer, model
        if size is not None:
            made = compressor.compress(order.ids[:size])
            smaller = copy.deepcopy(model)
            keep_rows(smaller, made.kept[0].ids)
        begun = time.monotonic()
        found = [perplexity(smaller, made, [tail], window=WINDOW) for tail in tails]
        tokens = sum(one.tokens for one in found)
        before = before or tokens
        rows = smaller.vocab_size
        coverage = 1.0 if size is None else order.coverage[min(size, len(order.ids))]
        cells = [f"{rows:,}", f"{coverage:.2%}", f"{embedding_share(rows, row, others):.1%}"]
        cells += [f"{rows * row + others:,}", f"{tokens / before:.3f}x", *(f"{one.bits_per_byte:.4f}" for one in found)]
        print(f"| {' | '.join(cells)} |  {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
