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


def to_local(tensor: Tensor) -> Tensor:
    """This process's part; every process's gradient by it is that of the same part."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def to_local_of_heads(tensor: Tensor) -> Tensor:
    """A tensor that is whole on every process of tensor parallelism, and that each uses for its own heads or columns.

    So each process's gradient by it is a part, and the sum of all is the gradient.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.to_local(grad_placements=[Partial() for _ in tensor.placements])


def shard_like(value: Tensor, example: DTensor) -> DTensor:
    """This process's part of `value`, which every process holds whole, so that nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements, src_data_rank=None)
