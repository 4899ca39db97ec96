"""Rows that hold several texts, with attention inside each text only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each text of a batch lies; attention is causal inside it. Given as a mask to `Decoder.forward`.

    lengths: tokens of each text, one row after the other, padding counted as a text. None spans two rows.
    seq_len: tokens a row; the lengths of each row add up to it.
    offsets: [n + 1] int32: where each text begins, and the end, all rows in one.
    """

    lengths: tuple[int, ...]
    seq_len: int
    offsets: Tensor

    @classmethod
    def of(cls, rows: Iterable[Iterable[int]]) -> Segments:
        """Make them of each row's lengths.

        Raises:
            ValueError: for lengths that are not positive, or do not add up to the same in each row.
        """
        lengths = [tuple(row) for row in rows]
        totals = {sum(row) for row in lengths}
        flat = tuple(length for row in lengths for length in row)
        if len(totals) != 1 or min(flat, default=0) < 1:
            raise ValueError(f"lengths of segments must be positive and fill rows of one size, not {lengths}")
        return cls(flat, totals.pop(), torch.tensor([0, *flat]).cumsum(0).int())

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.lengths)

    @cached_property
    def num_pairs(self) -> int:
        """Pairs of tokens inside one text, each with itself and with all others: what attention computes."""
        return sum(length * length for length in self.lengths)

    def to(self, device: torch.device | str) -> Segments:
        """Return them with `offsets` on a device; the copy may still be under way."""
        pin = torch.device(device).type == "cuda" and self.offsets.device.type == "cpu"
        offsets = self.offsets.pin_memory() if pin else self.offsets
        return replace(self, offsets=offsets.to(device, non_blocking=True))

    @cached_property
    def dense(self) -> Tensor:
        """The same as a mask: [b, s, s] bool, True where a query (row) may attend. Made once, for all layers."""
        total = sum(self.lengths)
        places = torch.arange(total, dtype=torch.int32, device=self.offsets.device)
        which = torch.bucketize(places, self.offsets, right=True).view(-1, self.seq_len)
        return (which[:, :, None] == which[:, None, :]).tril()
