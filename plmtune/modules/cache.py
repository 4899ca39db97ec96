"""The KV cache of a decoder."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's share of a cache during one forward.

    Attributes:
        buffers: each [b, heads, max_seq_len, width], allocated once; MLA has one, GQA two (K, V).
        start: tokens already in them; of slots, in the fullest.
        slots: [b], which rows of the buffers this forward has; None: all.
        lengths: [b], tokens already in each slot.
    """

    buffers: tuple[Tensor, ...]
    start: int
    slots: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def shared(self) -> int:
        """How many of the first tokens all rows have in common, so that what follows from them is computed once."""
        return 0

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Write new entries, each [b, heads, s, width], in place; return views of all that is filled."""
        end = self.start + new[0].shape[2]
        if self.slots is not None:
            # An indexed write does not convert: under autocast the entries may be of another precision.
            new = tuple(entries.to(buffer.dtype) for buffer, entries in zip(self.buffers, new, strict=True))
            if self.lengths is None:
                for buffer, entries in zip(self.buffers, new, strict=True):
                    buffer[self.slots, :, self.start : end] = entries
                return new if self.start == 0 else tuple(buffer[self.slots, :, :end] for buffer in self.buffers)
            for buffer, entries in zip(self.buffers, new, strict=True):
                buffer[self.slots, :, self.lengths] = entries[:, :, 0]
            return tuple(buffer[: new[0].shape[0], :, :end] for buffer in self.buffers)
        for buffer, entries in zip(self.buffers, new, strict=True):
            buffer[:, :, self.start : end] = entries
        return tuple(buffer[:, :, :end] for buffer in self.buffers)


class Cache:
    """Preallocated, filled from the left; `length` tokens are in it.

    A forward advances `length` only after its last layer, so one that fails leaves the cache as it was.
    """

    def __init__(self, layers: list[tuple[Tensor, ...]], length: int = 0) -> None:
        self.layers = layers
        self.length = length

    @property
    def max_seq_len(self) -> int:
        return self.layers[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for layer in self.layers for buffer in layer)

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self.layers[index], self.length)

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens

    def clone(self) -> Cache:
        return Cache([tuple(buffer.clone() for buffer in layer) for layer in self.layers], self.length)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            ValueError: if there are fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be truncated to {length}")
        self.length = length


class Slots:
    """A cache whose rows start and end independently; its owner counts the tokens in them.

    Args:
        layers: each layer's buffers, as `Decoder.new_cache` makes them.
    """

    def __init__(self, layers: list[tuple[Tensor, ...]]) -> None:
        self.layers = layers
        for layer in layers:
            for buffer in layer:
                # Masked entries are multiplied by 0, and fresh memory may hold NaN.
                buffer.zero_()

    @property
    def max_seq_len(self) -> int:
        return self.layers[0][0].shape[2]

    def prefill(self, slots: Tensor, length: int = 0) -> Cache:
        """Return a cache for one forward that fills these slots, [b], after `length` tokens; no row sees another."""
        return SlotView(self.layers, length, slots)

    def put(self, prefix: Cache, slots: Tensor) -> None:
        """Copy a cache of one row to the beginning of each of these slots, [b]."""
        for layer, begin in zip(self.layers, prefix.layers, strict=True):
            for buffer, entries in zip(layer, begin, strict=True):
                buffer[slots, :, : prefix.length] = entries[:, :, : prefix.length]

    def decode(self, lengths: Tensor, longest: int) -> Cache:
        """Return a cache for one forward that gives each of the first b slots its next token.

        Where lengths differ, the forward needs `input_pos` and a mask.

        Args:
            lengths (Tensor): [b], tokens in each of them.
            longest: the largest of those.
        """
        return SlotView(self.layers, longest, torch.arange(len(lengths), device=lengths.device), lengths)

    def decode_same_length(self, count: int, length: int) -> Cache:
        """Return a cache for one forward that gives each of the first slots its next token, all having `length`."""
        return Cache([tuple(buffer[:count] for buffer in layer) for layer in self.layers], length)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot over another."""
        for layer in self.layers:
            for buffer in layer:
                buffer[target, :, :length] = buffer[source, :, :length]

    def take(self, other: Slots) -> None:
        """Copy all of a shorter one with as many slots."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for buffer, old in zip(mine, theirs, strict=True):
                buffer[:, :, : old.shape[2]] = old


class SlotView(Cache):
    """Slots as one forward sees them."""

    def __init__(
        self, layers: list[tuple[Tensor, ...]], length: int, slots: Tensor, lengths: Tensor | None = None
    ) -> None:
        super().__init__(layers, length)
        self.slots, self.lengths = slots, lengths

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self.layers[index], self.length, self.slots, self.lengths)


class SharedPrefix(Cache):
    """A prefix that all rows of a batch share, computed once: rows attend to it and append nothing.

    Args:
        cache: of one row; it is not copied.
    """

    # A forward appends nothing, so only the model's own max_seq_len limits it.
    max_seq_len = sys.maxsize

    def __init__(self, cache: Cache) -> None:
        super().__init__(
            [tuple(buffer[:, :, : cache.length] for buffer in layer) for layer in cache.layers], cache.length
        )

    def layer(self, index: int) -> SharedPrefixLayer:
        return SharedPrefixLayer(self.layers[index], self.length)

    def advance(self, num_tokens: int) -> None:
        """Do nothing: the prefix does not grow."""


class SharedPrefixLayer(LayerCache):
    """One layer's share of a shared prefix during one forward."""

    @property
    def shared(self) -> int:
        return self.start

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Return the prefix followed by each row's new entries, each [b, heads, s, width]; nothing is written."""
        rows = new[0].shape[0]
        return tuple(
            torch.cat((buffer.expand(rows, -1, -1, -1), entries), dim=2)
            for buffer, entries in zip(self.buffers, new, strict=True)
        )
