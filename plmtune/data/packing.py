"""Packing: whole conversations are combined into rows of one length with as little padding as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from plmtune.data.batches import IGNORE, Row
from plmtune.data.order import key_of, permute
from plmtune.data.rows import Refused


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One conversation as ids."""

    tokens: NDArray[np.int32]  # [n]
    trained: NDArray[np.bool_]  # [n], True for targets
    place: str  # for a person, such as "train.jsonl, line 17"


def fit(
    examples: Sequence[Example], seq_len: int, truncation: Literal["drop", "right"], left_out: Refused, cut: Refused
) -> list[Example]:
    """Drop examples longer than `seq_len`, or cut them there; drop those without a target. Count both.

    The first token of an example is no target, since no token predicts it.
    """
    kept = []
    for example in examples:
        exceeds = len(example.tokens) > seq_len
        if not example.trained[1:].any():
            left_out.add(example.place, "has no answer to train on")
        elif not exceeds:
            kept.append(example)
        elif truncation == "drop":
            left_out.add(example.place, f"is longer than seq_len ({seq_len:,} tokens)")
        elif not example.trained[1:seq_len].any():
            left_out.add(example.place, f"has no answer within its first {seq_len:,} tokens (seq_len)")
        else:
            cut.add(example.place, f"is cut at {seq_len:,} tokens (seq_len)")
            kept.append(replace(example, tokens=example.tokens[:seq_len], trained=example.trained[:seq_len]))
    return kept


def pack(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the row of each length, [n]: a row takes lengths in order, until one or two others fill it exactly.

    Decreasing best fit fills rows less (97% of 512 tokens of GSM8K, against 98% here) and groups similar lengths, so
    some steps would train on long conversations alone. The bits of two numbers hold which lengths are left and what
    each needs beside it, so the end of a row is found in a few operations for any number of lengths.

    Args:
        lengths: [n], each from 1 to `capacity`, in random order.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    left: list[list[int]] = [[] for _ in range(capacity + 1)]  # by length
    there = mirrored = 0  # bit l, and bit capacity - l: whether length l is left
    for index, length in enumerate(lengths.tolist()):
        left[length].append(index)
        there |= 1 << length
        mirrored |= 1 << capacity - length
    drawn = iter(lengths.tolist())
    row, room = -1, 0

    def take(length: int) -> None:
        nonlocal there, mirrored, room
        rows[left[length].pop()] = row
        room -= length
        if not left[length]:
            there ^= 1 << length
            mirrored ^= 1 << capacity - length

    while there:
        row, room = row + 1, capacity
        longest = there.bit_length() - 1
        take(next((length for length in drawn if left[length]), longest))
        while fits := there & ((2 << room) - 1):  # no length is 0, so a full row takes none
            longest = fits.bit_length() - 1
            pairs = fits & mirrored >> capacity - room  # lengths whose difference from the room is also left
            half = room // 2
            if room % 2 == 0 and len(left[half]) < 2:
                pairs &= ~(1 << half)
            if longest == room:
                take(room)
            elif pairs:
                # The two most similar lengths, to keep the shortest for small rooms.
                shorter = (pairs & (2 << half) - 1).bit_length() - 1
                longer = room - shorter
                take(shorter)
                take(longer)
            else:
                length = next((length for length in drawn if left[length]), longest)
                take(length if length <= room else longest)
    return rows


class PackedRows:
    """Rows of whole examples, see `fit`. Attention stays inside each example, and its last token predicts nothing.

    Positions start at 0 in each example. The end of a row is padded with zeros, which attend to no example and are not
    counted. `seed` decides which examples share a row.
    """

    def __init__(self, examples: Sequence[Example], seq_len: int, seed: int) -> None:
        lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
        for index in np.flatnonzero((lengths > seq_len) | (lengths < 1))[:1]:
            raise ValueError(
                f"{examples[index].place} has {lengths[index]:,} tokens, and a row takes 1 to seq_len ({seq_len:,})"
            )
        order = permute(np.arange(len(examples)), len(examples), key_of(seed, "packing"))
        rows = pack(lengths[order], seq_len)
        self.seq_len = seq_len
        self.num_rows = int(rows.max()) + 1 if len(rows) else 0
        self.num_tokens = int(lengths.sum())
        self.num_trained = sum(int(np.count_nonzero(example.trained[1:])) for example in examples)
        self._examples = examples
        self._members = order[np.argsort(rows, kind="stable")]  # row after row
        self._firsts = np.cumsum([0, *np.bincount(rows, minlength=self.num_rows)])

    def examples(self, index: int) -> list[Example]:
        """Return the examples of row `index`, in their order."""
        first, end = self._firsts[index : index + 2]
        return [self._examples[member] for member in self._members[first:end]]

    def row(self, index: int) -> Row:
        tokens = np.zeros(self.seq_len, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE, dtype=np.int64)
        lengths, filled = [], 0
        for example in self.examples(index):
            length = len(example.tokens)
            tokens[filled : filled + length] = example.tokens
            targets[filled : filled + length - 1] = np.where(example.trained[1:], example.tokens[1:], IGNORE)
            lengths.append(length)
            filled += length
        if filled < self.seq_len:
            lengths.append(self.seq_len - filled)
        return Row(tokens, targets, tuple(lengths))

    def locate(self, index: int) -> str:
        return "; ".join(example.place for example in self.examples(index))

    def describe(self) -> str:
        full = self.num_tokens / (self.num_rows * self.seq_len) if self.num_rows else 0.0
        return (
            f"{len(self._examples):,} conversations of {self.num_tokens:,} tokens ({self.num_trained:,} trained), "
            f"rows {full:.1%} full"
        )
