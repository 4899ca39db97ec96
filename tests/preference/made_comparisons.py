"""Comparisons of random ids, and batches of them."""

import numpy as np

from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, MISMATCHED
from plmtune.preference.batches import PreferenceBatches
from plmtune.preference.comparisons import Comparison


def comparisons(count=23, kinds=(DIRECT, GIVEN_REJECTED, GIVEN_CHOSEN), seed=0, longest=12):
    """Random ids; the lengths of answers differ, and so do all prompts."""
    draw = np.random.default_rng(seed)

    def ids():
        return draw.integers(1, 50, draw.integers(1, longest + 1)).astype(np.int32)

    out = []
    for number in range(count):
        chosen, rejected = ids(), ids()
        for kind in kinds:
            answers = (chosen, None) if kind == MISMATCHED else (chosen, rejected)
            out.append(Comparison(kind, ids(), *answers, number, f"pairs.jsonl, line {number + 1}"))
    return out


def batches(data=None, **changes):
    settings = {"seq_len": 32, "global_batch_size": 5, "micro_batch_size": 2, "seed": 3}
    return PreferenceBatches(comparisons() if data is None else data, **(settings | changes))
