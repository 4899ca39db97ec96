"""The cache of a decoder: what attention keeps of earlier tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's share of a cache during one forward.

    Attributes:
        buffers: each [b, heads, max_seq_len, width], allocated once; MLA has one, GQA two (K, V).
        start: tokens already in them.
    """

    buffers: tuple[Tensor, ...]
    start: int

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Write new entries, each [b, heads, s, width], in place; return views of all that is filled."""
        end = self.start + new[0].shape[2]
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

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] held; rows (Tensor): [b'], so b may change."""
        self.layers = [tuple(buffer.index_select(0, rows) for buffer in layer) for layer in self.layers]
