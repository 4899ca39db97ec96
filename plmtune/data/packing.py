"""Whole conversations packed into rows of one length: nothing is padded that another one could fill."""

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
    """One conversation as ids.

    tokens: [n] int32. trained: [n] bool, True for what the model is to write itself. place: where it stands, for a
    person, such as "train.jsonl, line 17".
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    place: str


def fit(
    examples: Sequence[Example], seq_len: int, how: Literal["drop", "cut"]
) -> tuple[list[Example], Refused, Refused]:
    """Drop examples longer than `seq_len`, or cut them there; drop those that have nothing to train on.

    The first token of an example has none before it that would predict it, so it is nothing to train on.

    Returns:
        Those that fit, those that were left out and those that were cut, the last two counted with their places.
    """
    kept, left_out, cut = [], Refused(), Refused()
    for example in examples:
        too_long = len(example.tokens) > seq_len
        if not example.trained[1:].any():
            left_out.add(example.place, "has no answer to train on")
        elif not too_long:
            kept.append(example)
        elif how == "drop":
            left_out.add(example.place, f"is longer than seq_len ({seq_len:,} tokens)")
        elif not example.trained[1:seq_len].any():
            left_out.add(example.place, f"has no answer within its first {seq_len:,} tokens (seq_len)")
        else:
            cut.add(example.place, f"is cut at {seq_len:,} tokens (seq_len)")
            kept.append(replace(example, tokens=example.tokens[:seq_len], trained=example.trained[:seq_len]))
    return kept, left_out, cut


def pack(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the row of each length, [n], by best fit: each goes where it leaves the least room (Johnson 1974).

    Rows so filled are few where the lengths come in decreasing order. n log n at worst: the rows are kept by the
    room that they have, and which rooms there are in the bits of a number.

    Args:
        lengths: [n], each from 1 to `capacity`, in the order in which they are placed.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = opened = 0
    for index, length in enumerate(lengths.tolist()):
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room, opened = opened, capacity, opened + 1
        rows[index] = row
        if rest := room - length:
            with_room[rest].append(row)
            rooms |= 1 << rest
    return rows


class PackedRows:
    """Rows of whole examples. Each example sees itself alone, and its last token predicts nothing.

    Positions begin again with each example. What a row has left at its end is filled with zeros, which see no example
    and are not counted.

    Args:
        examples: none longer than `seq_len`; see `fit`.
        seq_len: tokens a row.
        seed: of which examples of one length meet in a row.

    Attributes:
        num_rows: rows. num_tokens: of all examples. num_trained: targets that count.

    Raises:
        ValueError: for an example that is empty or longer than `seq_len`.
    """

    def __init__(self, examples: Sequence[Example], seq_len: int, seed: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len ({seq_len}) must be at least 1")
        lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
        for index in np.flatnonzero((lengths > seq_len) | (lengths < 1))[:1]:
            raise ValueError(
                f"{examples[index].place} has {lengths[index]:,} tokens, and a row takes 1 to seq_len ({seq_len:,})"
            )
        shuffled = permute(np.arange(len(examples)), len(examples), key_of(seed, "packing"))
        order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
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
        """Return row `index`."""
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
        """Return the places of the row's examples."""
        return "; ".join(example.place for example in self.examples(index))

    def describe(self) -> str:
        """Return how many conversations and tokens there are, and how full the rows."""
        full = self.num_tokens / (self.num_rows * self.seq_len) if self.num_rows else 0.0
        return (
            f"{len(self._examples):,} conversations of {self.num_tokens:,} tokens ({self.num_trained:,} trained), "
            f"rows {full:.1%} full"
        )
