"""Feed-forward layers, [b, s, d] -> [b, s, d]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.registry import register


class SquareOfReLU(torch.autograd.Function):
    """relu(x)^2 with the derivative 2 relu(x): one tensor kept and two passes back, where autograd's own takes four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return upstream * positive * 2


@register("ffn", "squared_relu")
class SquaredReLU(nn.Module):
    """PLM's FFN: down(relu(up(x))^2), no gate, no bias (Primer, arXiv 2109.08668; PLM, arXiv 2503.12167).

    With `record_sparsity` set, `sparsity` holds the share of exact zeros of the last forward's activation, as
    a tensor on the device: reading it is the only synchronisation.

    Args:
        embed_dim: width of the residual stream.
        hidden_dim: width between the two projections.
    """

    def __init__(self, embed_dim: int, *, hidden_dim: int = 8192) -> None:
        super().__init__()
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias=False)
        self.record_sparsity = False
        self.sparsity: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = SquareOfReLU.apply(self.up_proj(x))
        if self.record_sparsity:
            self.sparsity = (hidden.detach() == 0).float().mean(-1)  # [b, s]
        return self.down_proj(hidden)


@register("ffn", "swiglu")
class SwiGLU(nn.Module):
    """Llama's FFN: down(silu(gate(x)) * up(x)) (arXiv 2002.05202).

    Args:
        embed_dim: width of the residual stream.
        hidden_dim: width between the projections.
    """

    def __init__(self, embed_dim: int, *, hidden_dim: int = 5632) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
