"""An exponential moving average of the weights, beside those that are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.models.checkpoint_files import Stored, locate
from plmtune.models.hf import load_model, run_state
from plmtune.modules.decoder import Decoder

STEM = "ema"  # of its files in a checkpoint, which have the names and shapes of the model's


@dataclass
class Ema:
    """a <- d a + (1 - d) w after each update, with d = min(decay, (1 + t) / (10 + t)) after t updates.

    The smaller factor of the first updates forgets the initial weights (as in TensorFlow's ExponentialMovingAverage).

    Attributes:
        tensors: the averages by their names in a checkpoint, sharded as the model is.
        updates: t.
    """

    decay: float
    tensors: dict[str, Tensor]
    updates: int = 0

    @classmethod
    def of(cls, model: Decoder, decay: float) -> Ema:
        """Start an average at a model's present weights. Call it after the model was distributed."""
        return cls(decay, {name: tensor.detach().clone() for name, tensor in run_state(model).items()})

    @torch.no_grad()
    def update(self, model: Decoder) -> None:
        """Take the weights of an update into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, current in self._pairs(model):
            average.lerp_(current, 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: Decoder) -> Iterator[None]:
        """Give the model the averages inside the block, and its own weights back after it."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: Decoder) -> None:
        for average, current in self._pairs(model):
            own = current.clone()
            current.copy_(average)
            average.copy_(own)

    def _pairs(self, model: Decoder) -> list[tuple[Tensor, Tensor]]:
        """The averages and the weights, each process's own part of them."""
        state: Mapping[str, Tensor] = run_state(model)
        return [(_local(self.tensors[name]), _local(tensor.detach())) for name, tensor in state.items()]


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor


@torch.no_grad()
def load_average(directory: Path) -> Decoder:
    """Load a checkpoint's model with the averaged weights in place of its own.

    Raises:
        UserError: if the checkpoint has none.
    """
    model = load_model(directory)
    found = Stored(locate(directory, STEM)) if any(directory.glob(f"{STEM}*.safetensors")) else None
    if found is None:
        raise UserError(f"{directory} has no averaged weights. A run keeps them with ema.decay=0.999.")
    for name, tensor in run_state(model).items():
        tensor.copy_(found[name])
    return model
