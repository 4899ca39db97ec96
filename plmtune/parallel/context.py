"""Context parallelism: processes that share each sequence, and gather what attention reads of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ContextShard:
    """The part of each sequence that one of `size` processes has.

    A sequence has 2 size equal chunks, and process i has chunks i and 2 size - 1 - i: of causal attention each process
    then computes equally many scores.

    Attributes:
        rank: i.
        group: the processes that share sequences.
    """

    rank: int
    size: int
    group: dist.ProcessGroup

    def chunks(self, seq_len: int) -> tuple[range, range]:
        """The places of this process's tokens.

        Raises:
            ValueError: if 2 size does not divide seq_len.
        """
        length, over = divmod(seq_len, 2 * self.size)
        if over:
            raise ValueError(
                f"{self.size} processes share {2 * self.size} chunks, which do not divide {seq_len} tokens"
            )
        numbers = self.rank, 2 * self.size - 1 - self.rank
        return tuple(range(number * length, (number + 1) * length) for number in numbers)  # type: ignore[return-value]

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The whole of a tensor whose dimension `dim` counts the tokens, in their order."""
        from torch.distributed._functional_collectives import all_gather_single_autograd

        whole = all_gather_single_autograd(part.contiguous(), dim, self.group)
        return in_order(whole, dim, self.size)


def in_order(gathered: Tensor, dim: int, size: int) -> Tensor:
    """Tokens in their order, of all processes' parts one after the other along `dim`."""
    chunks = gathered.unflatten(dim, (2 * size, -1))
    # Chunk c is the first of process c, or the second of process 2 size - 1 - c.
    places = [2 * c if c < size else 2 * (2 * size - 1 - c) + 1 for c in range(2 * size)]
    return chunks.index_select(dim, torch.tensor(places, device=gathered.device)).flatten(dim, dim + 1)
