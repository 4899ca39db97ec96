"""What training of a learned mask changes: gates, multipliers and, if asked, the model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.modules.decoder import Decoder
from plmtune.pruning.groups import groups_of
from plmtune.pruning.hard_concrete import HardConcrete, Multipliers
from plmtune.pruning.masked import LAYERS
from plmtune.pruning.sizes import Sizes
from plmtune.pruning.width import shares_that_stay

_MAX_GRAD_NORM = 1.0  # of the weights, as in Sheared-LLaMA
_MISSED = 0.05  # share of the units by which a mask misses its size


def mask_shares(model: Decoder, depth: str | None, width: str | None, before: Sizes, after: Sizes) -> dict[str, float]:
    """The share that stays under each mask that is learned with others: of layers, and of units of groups."""
    layers = {LAYERS: after.num_layers / before.num_layers} if depth == "mask" else {}
    return layers | (shares_that_stay(groups_of(model), after) if width == "mask" else {})


class MaskTraining:
    """Gates of some groups of a model, their multipliers, one Adam for all, and the order of the text.

    Args:
        shares: of the units of each group, or of the layers, that stay.
        rows (Tensor): ids to learn on, [n, s]; seen in a new order after all were seen.
        warmup: share of the steps in which the targets fall from 1, and the rate of the weights rises from 0.
        lr: of the gates and of the multipliers.
        weights_lr: of the model's weights, which it changes in place; 0: they stay as they are.
    """

    def __init__(
        self,
        model: Decoder,
        shares: Mapping[str, float],
        rows: Tensor,
        *,
        steps: int,
        batch_size: int,
        warmup: float,
        lr: float,
        weights_lr: float,
        seed: int,
    ) -> None:
        self.model, self.shares, self.rows = model, dict(shares), rows
        self.steps, self.batch_size, self.weights_lr = steps, batch_size, weights_lr
        self.warmup, self.step = int(warmup * steps), 0
        units = {name: group.units for name, group in groups_of(model).items()} | {LAYERS: len(model.layers)}
        self.gates = HardConcrete({name: units[name] for name in shares}).to(model.device)
        self.multipliers = Multipliers(shares, self.warmup).to(model.device)
        trained: list[dict[str, Any]] = [
            {"params": [*self.gates.parameters()]},
            {"params": [*self.multipliers.parameters()], "maximize": True},
        ]
        if weights_lr:
            trained.append({"params": [*model.parameters()]})
        self.optimizer = torch.optim.Adam(trained, lr=lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)
        model.requires_grad_(bool(weights_lr))

    def draw(self) -> dict[str, Tensor]:
        """Gates of a step, by name, with their graph."""
        return self.gates.sample(self.generator)

    def next_rows(self) -> Tensor:
        """The ids of a step, [batch_size, s]."""
        while len(self.order) < self.batch_size:
            self.order = torch.cat((self.order, torch.randperm(len(self.rows), generator=self.generator)))
        now, self.order = self.order.split((self.batch_size, len(self.order) - self.batch_size))
        return self.rows[now]

    def penalty(self) -> Tensor:
        """The Lagrangian's term of this step, with its graph."""
        return self.multipliers(self.gates.kept(), self.step)

    def update(self) -> None:
        """Make an optimizer step by the gradients at hand."""
        if self.weights_lr:
            nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM)
            self.optimizer.param_groups[-1]["lr"] = self.weights_lr * min(1.0, (self.step + 1) / max(1, self.warmup))
        self.optimizer.step()
        self.gates.clip()
        self.optimizer.zero_grad()
        self.step += 1

    def largest_gap(self) -> float:
        """The largest difference of a mask's share to its target, with its sign."""
        reached = self.reached()
        gaps = [reached[name] - self.multipliers.target(name, self.step) for name in self.shares]
        return max(gaps, key=abs)

    def reached(self) -> dict[str, float]:
        """The share of each mask that its gates keep."""
        return {name: float(values.detach().mean()) for name, values in self.gates.kept().items()}

    def missed(self) -> str:
        """A sentence about masks that are not at their size; empty: all are."""
        reached = self.reached()
        missed = [name for name, share in self.shares.items() if abs(reached[name] - share) > _MISSED]
        if not missed:
            return ""
        worst = max(missed, key=lambda name: abs(reached[name] - self.shares[name]))
        return (
            f"{len(missed)} of {len(self.shares)} masks have not reached their size: {worst} keeps "
            f"{reached[worst]:.1%} of its units, and {self.shares[worst]:.1%} were asked for. More mask.steps choose "
            "better."
        )

    def state(self) -> dict[str, Tensor]:
        """All that a step changes, on the host."""
        found: dict[str, Tensor] = {
            "step": torch.tensor(self.step),
            "generator": self.generator.get_state(),
            "order": self.order,
        }
        for prefix, owner in self._owners().items():
            found |= {f"{prefix}.{name}": tensor for name, tensor in owner.state_dict().items()}
        for index, held in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": tensor for name, tensor in held.items()}
        return {name: tensor.detach().cpu() for name, tensor in found.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        self.step, self.order = int(state["step"]), state["order"]
        self.generator.set_state(state["generator"])
        for prefix, owner in self._owners().items():
            named = {name: state[f"{prefix}.{name}"] for name in owner.state_dict()}
            owner.load_state_dict(named)
        held: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                held.setdefault(int(index), {})[key] = tensor.clone()
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": held})

    def _owners(self) -> dict[str, nn.Module]:
        owners: dict[str, nn.Module] = {"gates": self.gates, "multipliers": self.multipliers}
        return owners | ({"model": self.model} if self.weights_lr else {})
