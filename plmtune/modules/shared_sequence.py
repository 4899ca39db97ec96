"""Attention where each process has a part of every sequence (context parallelism)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plmtune.modules.attention_kernels import attend
from plmtune.modules.segments import Segments


@dataclass(frozen=True, eq=False)
class SharedSequence:
    """Which tokens of each row this process has. Given as a mask to `Decoder.forward`.

    Attributes:
        chunks: the places of the process's tokens in the whole row, in order.
        gather: (tensor, dim) -> the tensor of the whole row, from all processes' parts; its backward adds the gradients
            of all processes up.
        segments: the texts of the whole rows, between which there is no attention; None: plain causal attention.
    """

    chunks: tuple[range, ...]
    gather: Callable[[Tensor, int], Tensor]
    segments: Segments | None = None

    def to(self, device: torch.device | str) -> SharedSequence:
        """Return it with its tensors on a device."""
        return self if self.segments is None else replace(self, segments=self.segments.to(device))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        """`attention_kernels.attend` of the process's queries over the whole row.

        Args:
            q (Tensor): [b, h, s / n, d]. k (Tensor): [b, h / g, s, d]. v (Tensor): [b, h / g, s, v].

        Returns:
            Tensor: [b, h, s / n, v]
        """
        found = []
        for chunk, part in zip(self.chunks, q.split([len(chunk) for chunk in self.chunks], dim=2), strict=True):
            seen = slice(chunk.stop)  # no query attends to what follows its chunk
            mask = None if self.segments is None else self.segments.dense[:, chunk.start : chunk.stop, seen]
            found.append(attend(part, k[:, :, seen], v[:, :, seen], mask, scale, window=window, soft_cap=soft_cap))
        return torch.cat(found, dim=2)


# What `Decoder.forward` and attention take: boolean [b, s, t], True where it may attend; the texts of each row; a part
# of each row; or None, causal.
Mask = Tensor | Segments | SharedSequence | None
