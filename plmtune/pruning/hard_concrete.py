"""Masks that are learned: hard-concrete gates, held to a size by Lagrange multipliers (Sheared-LLaMA)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from plmtune.errors import UserError

_BETA = 2 / 3  # temperature; the published choices
_LOW, _HIGH = -0.1, 1.1
_SHIFT = _BETA * math.log(-_LOW / _HIGH)
_START = 3.0  # of log_alpha: a gate is open with probability 0.99, so that training begins near the whole model
_LIMIT = math.log(1e2)  # of log_alpha, both ways: beyond it the sigmoid is flat, and a gate would stay as it is
_LEAST_SHARE = 1 / (1 + math.exp(_LIMIT + _SHIFT))  # of a mask's units that gates can be held to


class HardConcrete(nn.Module):
    """Gates z in [0, 1] with P(z = 0) > 0 (arXiv 1712.01312, eqs. 10 to 12).

    u ~ U(0, 1), s = sigmoid((log u - log(1 - u) + log_alpha) / beta), z = clamp(s (high - low) + low, 0, 1).

    Args:
        units: gates of each mask, by name.

    Attributes:
        log_alpha: a parameter for each mask, [units].
    """

    def __init__(self, units: Mapping[str, int]) -> None:
        super().__init__()
        self.names = list(units)
        self.log_alpha = nn.ParameterList(nn.Parameter(torch.full((count,), _START)) for count in units.values())

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Gates of new random numbers, with their graph."""
        found = {}
        for name, log_alpha in zip(self.names, self.log_alpha, strict=True):
            u = torch.rand(log_alpha.shape, generator=generator).to(log_alpha.device).clamp(1e-6, 1 - 1e-6)
            s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / _BETA)
            found[name] = (s * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        return found

    def kept(self) -> dict[str, Tensor]:
        """P(z > 0) of each gate (eq. 12), with its graph."""
        return {
            name: torch.sigmoid(log_alpha - _SHIFT) for name, log_alpha in zip(self.names, self.log_alpha, strict=True)
        }

    @torch.no_grad()
    def clip(self) -> None:
        """Keep log_alpha where it has a gradient, as Sheared-LLaMA does after each step."""
        for log_alpha in self.log_alpha:
            log_alpha.clamp_(-_LIMIT, _LIMIT)

    def scores(self) -> dict[str, Tensor]:
        """What the gates say of their units: log_alpha, larger for those that stay."""
        return {n: log_alpha.detach().cpu().clone() for n, log_alpha in zip(self.names, self.log_alpha, strict=True)}


class Multipliers(nn.Module):
    """Lagrange multipliers that hold each mask's mean P(z > 0) at a target (Sheared-LLaMA, arXiv 2310.06694, sec. 2.1).

    Args:
        targets: the share of each mask's units that stays.
        warmup: steps in which the targets fall from 1.
    """

    def __init__(self, targets: Mapping[str, float], warmup: int) -> None:
        super().__init__()
        self.targets, self.warmup = dict(targets), warmup
        self.first = nn.Parameter(torch.zeros(len(targets)))
        self.second = nn.Parameter(torch.zeros(len(targets)))

    def forward(self, kept: Mapping[str, Tensor], step: int) -> Tensor:
        """lambda_1 (kept - target) + lambda_2 (kept - target)^2, summed over the masks. The masks minimise it, and the
        multipliers maximise it."""
        gaps = torch.stack([kept[name].mean() - self.target(name, step) for name in self.targets])
        return (self.first * gaps + self.second * gaps.square()).sum()

    def target(self, name: str, step: int) -> float:
        """The share that stays at a step."""
        return 1 - (1 - self.targets[name]) * min(1.0, step / max(1, self.warmup))


def refuse_unreachable(shares: Mapping[str, float], *, steps: int, lr: float) -> None:
    """Refuse masks that cannot reach their size.

    Adam moves a gate by about lr a step. Half of the steps more are needed than it then takes to close, since the
    multipliers begin at 0 and move by as much.

    Args:
        shares: of each mask's units that stay.

    Raises:
        UserError: with the numbers.
    """
    name = min(shares, key=lambda each: shares[each])
    if shares[name] < _LEAST_SHARE:
        raise UserError(
            f"key model: the mask of {name} cannot be held to {shares[name]:.1%} of its units: a gate stays open with "
            f"a probability of at least {_LEAST_SHARE:.1%}. Prune in several steps, or choose another importance."
        )
    least = math.ceil(1.5 * (_START + _LIMIT) / lr)
    if steps < least:
        raise UserError(
            f"key mask.steps: {shares[name]:.1%} of the units of {name} cannot be reached in {steps:,} steps at "
            f"mask.lr={lr:g}: a gate closes after {least:,} at the earliest, and some hundreds choose well. Set "
            f"mask.steps={max(400, least):,} or more."
        )
