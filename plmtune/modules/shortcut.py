"""Shortcuts beside attention, [b, s, d] -> [b, s, d]: what is added to attention's output from its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.modules.linear import linear
from plmtune.ranges import WIDTH, check
from plmtune.registry import register


@register("shortcut", "none")
def no_shortcut(embed_dim: int) -> None:
    """The residual connection alone."""


@register("shortcut", "augmented")
class AugmentedShortcut(nn.Module):
    """Augmented shortcuts (PanGu-pi, arXiv 2312.17276, eq. 4 and section 4.1; arXiv 2106.15941):

        AugMSA(z) = MSA(z) + z + sum over i = 1..num_shortcuts of T_i(z),   T_i(z) = U_i gelu(D_i z)

    with D_i: d -> d / reduction and U_i: d / reduction -> d. Here z is the input of attention: after the norm, as for
    MSA, where the residual connection's z is before it. The sum of the T_i is one product with all D_i and one with all
    U_i. U starts at 0 (ours), so that the model starts as one without shortcuts; D is drawn after all other matrices,
    so that those are the same for a seed. D and U have no biases, as Llama's matrices, and are no layers of their own:
    they stay unquantized and get no adapters.

    Args:
        embed_dim: width of the residual stream.
        num_shortcuts: T_i that are summed.
        reduction: divides the width; the paper's 32 costs 1/4 of a d x d matrix for two shortcuts with both products.

    Raises:
        ValueError: if the reduction leaves no width.
    """

    initial: ClassVar = {"up": 0.0}
    drawn_last = True

    @staticmethod
    def extends(component: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """It starts as no shortcut at all; None: as nothing else."""
        return {} if component == "none" else None

    def __init__(self, embed_dim: int, *, num_shortcuts: int = 2, reduction: int = 32) -> None:
        super().__init__()
        check(WIDTH, num_shortcuts=num_shortcuts, reduction=reduction)
        if reduction > embed_dim:
            raise ValueError(f"reduction ({reduction}) is more than embed_dim ({embed_dim}), which leaves no width")
        width = num_shortcuts * (embed_dim // reduction)
        self.num_shortcuts = num_shortcuts
        self.down = nn.Parameter(torch.empty(width, embed_dim))
        self.up = nn.Parameter(torch.empty(embed_dim, width))

    def forward(self, x: Tensor) -> Tensor:
        return linear(F.gelu(linear(x, self.down)), self.up)


def add_shortcut(attended: Tensor, x: Tensor, shortcut: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Attention's output with the shortcuts of its input x (Tensor), both [b, s, d]."""
    return attended if shortcut is None else attended + shortcut(x)
