"""Muon's step for CPUs: Newton-Schulz in fp32, all matrices of a shape at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plmtune.modules.sharding import full_tensor, is_sharded, shard_like


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix's U S V^T (Muon, arXiv 2502.16982, eq. 2).

    X <- a X + (b X X^T + c (X X^T)^2) X, from X / ||X||; singular values end near 1, not at 1.

    Args:
        matrices (Tensor): [k, rows, columns].

    Returns:
        Tensor: [k, rows, columns]
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class CPUMuon(torch.optim.Muon):
    """torch's Muon with another step: same settings, same state, same update but for rounding.

    torch orthogonalises in bf16, matrix by matrix. Without bf16 units that takes several times as long as fp32, and
    small matrices cost more to call than to compute: benchmarks/muon.py. Each process orthogonalises whole matrices and
    keeps its shards of the updates, so that many processes take the step of one.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` may compute the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                # 0.2 sqrt(max(rows, columns)) gives the update AdamW's usual size (arXiv 2502.16982, eq. 4).
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                updates = torch.stack([full_tensor(self._momentum(parameter, group)) for parameter in parameters])
                updates = orthogonalize(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for parameter, update in zip(parameters, updates, strict=True):
                    part = shard_like(update, parameter) if is_sharded(parameter) else update
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(part, alpha=-rate)
        return loss

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"])  # Nesterov
