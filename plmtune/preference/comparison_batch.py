"""Micro-batches of comparisons: rows of token ids, attention masks, and the positions of the answers' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plmtune.losses.preference import DIRECT
from plmtune.preference.comparisons import Comparison


@dataclass(frozen=True)
class ComparisonBatch:
    """One micro-batch of n comparisons with t answer tokens, packed into b rows of s tokens.

    A comparison is laid out as prompt, chosen, rejected. Both answers attend to the prompt and not to each other, and
    the positions of both continue the prompt's. A rank without comparisons has an empty batch, which keeps ranks in
    step.

    Attributes:
        tokens, input_pos: [b, s] int64.
        mask: [b, s, s] bool, True where a query (row) may attend.
        positions: [t] int64, flat positions in [b * s] whose hidden states predict the answers' tokens.
        targets: [t] int64, those tokens.
        completion: [t] int64, their answer: 2i is the chosen answer of comparison i, 2i + 1 the rejected one.
        lengths: [2n] int64, tokens of each answer; 0: there is none.
        ends: [2n] int64, flat position of each answer's last token; where there is none, of the prompt's.
        kind: [n] int64.
        index: [n] int64, number of the comparison in the data.
        num_pairs: number of direct comparisons.
        num_tokens: tokens that are no padding.
        kl_only: the comparisons are mismatched: KTO's KL term is computed from them, and they are not trained on. Equal
            on all ranks, also for an empty batch.
    """

    tokens: Tensor
    input_pos: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    completion: Tensor
    lengths: Tensor
    ends: Tensor
    kind: Tensor
    index: Tensor
    num_pairs: int
    num_tokens: int
    kl_only: bool = False

    def to(self, device: torch.device | str) -> ComparisonBatch:
        """Return the batch on a device; the copy may still be under way."""
        # From pageable memory a copy to a GPU would first wait for all work that is queued there.
        pin = torch.device(device).type == "cuda" and self.tokens.device.type == "cpu"
        move: dict[str, Any] = {
            field.name: (value.pin_memory() if pin else value).to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **move)


def make_batch(
    comparisons: Sequence[Comparison], rows: Sequence[Sequence[int]], *, kl_only: bool = False
) -> ComparisonBatch:
    """Lay out rows of comparisons, given by their indices; rows are as long as the longest.

    Padding attends to itself, so that no row of attention is empty.
    """
    order = [index for row in rows for index in row]
    widths = [sum(comparisons[index].num_tokens for index in row) for row in rows]
    b, s = max(1, len(rows)), max([1, *widths])
    tokens = np.zeros((b, s), dtype=np.int64)
    input_pos = np.zeros((b, s), dtype=np.int64)
    mask = np.zeros((b, s, s), dtype=np.bool_)
    triangle = np.tri(max([1, *(ids.size for index in order for ids in comparisons[index].parts)]), dtype=np.bool_)
    positions, targets, lengths, ends = [], [], [], []
    for number, row in enumerate(rows):
        at = 0
        for index in row:
            held = comparisons[index]
            size = held.prompt.size
            prompt = slice(at, at + size)
            tokens[number, prompt] = held.prompt
            input_pos[number, prompt] = np.arange(size)
            mask[number, prompt, prompt] = triangle[:size, :size]
            at += size
            last = number * s + at - 1  # of the prompt: it predicts the first token of both answers
            for answer in (held.chosen, held.rejected):
                ids = np.empty(0, dtype=np.int32) if answer is None else answer
                here = slice(at, at + ids.size)
                tokens[number, here] = ids
                input_pos[number, here] = size + np.arange(ids.size)
                mask[number, here, prompt] = True
                mask[number, here, here] = triangle[: ids.size, : ids.size]
                before = number * s + at - 1 + np.arange(ids.size)
                before[:1] = last
                positions.append(before)
                targets.append(ids)
                lengths.append(ids.size)
                at += ids.size
                ends.append(number * s + at - 1 if ids.size else last)
        padding = np.arange(at, s)
        mask[number, padding, padding] = True
    if not rows:
        mask[:] = True
    kind = np.array([comparisons[index].kind for index in order], dtype=np.int64)
    counts = np.array(lengths, dtype=np.int64)
    nothing = np.empty(0, dtype=np.int64)
    return ComparisonBatch(
        tokens=torch.from_numpy(tokens),
        input_pos=torch.from_numpy(input_pos),
        mask=torch.from_numpy(mask),
        positions=torch.from_numpy(np.concatenate([nothing, *positions])),
        targets=torch.from_numpy(np.concatenate([nothing, *targets])),
        completion=torch.from_numpy(np.repeat(np.arange(counts.size), counts)),
        lengths=torch.from_numpy(counts),
        ends=torch.from_numpy(np.array(ends, dtype=np.int64)),
        kind=torch.from_numpy(kind),
        index=torch.from_numpy(np.array(order, dtype=np.int64)),
        kl_only=kl_only,
        num_pairs=int((kind == DIRECT).sum()),
        num_tokens=sum(widths),
    )
