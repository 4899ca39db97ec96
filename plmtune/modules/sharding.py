"""DTensors: a process's part of a tensor that FSDP2 spreads over several.

torch.distributed.tensor takes half a CPU second to import, and a single process has no DTensor. So this file imports
it only where one is made.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # without it nobody has made one
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, sharded or not. Every rank must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(value: Tensor, example: DTensor) -> DTensor:
    """This process's part of `value`, which every process holds whole, so that nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements, src_data_rank=None)
