"""Norms: torch's own fused kernels, in the dtype of the activations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.ranges import TINY, check
from plmtune.registry import register


def autocast_active(device: torch.device) -> bool:
    """Whether autocast changes dtypes on `device`; some devices (meta) do not know it at all."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    # Autocast would turn the input into fp32 and hand fp32 on; the kernels already sum in fp32 by themselves.
    return torch.autocast(device.type, enabled=False) if autocast_active(device) else nullcontext()


@register("norm", "rms_norm")
class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight.

    Args:
        dim: width that is normalised.
        eps: added to the mean square.
        unit_offset: multiply by 1 + weight, as Gemma does (arXiv 2403.08295); the weight then starts at 0.

    Raises:
        ValueError: if eps is negative.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, unit_offset: bool = False) -> None:
        super().__init__()
        check(TINY, eps=eps)
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.zeros(dim) if unit_offset else torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with _without_autocast(x.device):
            if self.unit_offset:  # in fp32, as in transformers: in bf16 1 + weight would lose the weight's digits
                factors = 1 + self.weight.float()
                return F.rms_norm(x.float(), factors.shape, factors, self.eps).to(x.dtype)
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


@register("norm", "layer_norm")
class LayerNorm(nn.Module):
    """Layer norm (arXiv 1607.06450) with weight and bias.

    Args:
        dim: width that is normalised.
        eps: added to the variance.

    Raises:
        ValueError: if eps is negative.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        check(TINY, eps=eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        with _without_autocast(x.device):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)
