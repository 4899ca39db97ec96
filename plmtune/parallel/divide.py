"""A model divided between the processes of a layout: tensor parallelism first, then FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plmtune.parallel.mesh import Processes
from plmtune.parallel.tensor import apply_tensor_parallelism


def divide(model: Any, processes: Processes, dtype: torch.dtype) -> Any:
    """Divide a model, in place: on the meta device, or equal on every process.

    Args:
        model: a Decoder, or a part of one; FSDP2 takes its `layers` one by one.
        dtype: what FSDP2 computes in; gradients are always reduced in fp32.
    """
    tp = processes.part("tp")
    if tp is not None:
        apply_tensor_parallelism(model, tp)
    shard = processes.part("replicate", "shard")
    if shard is not None:
        layout = processes.layout
        # With a pipeline each micro-batch would gather the weights anew.
        _shard(model, shard, dtype, reshard=layout.reshard_after_forward and layout.pp == 1)
    return model


def _shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, *, reshard: bool) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a CPU second

    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for layer in getattr(model, "layers", ()):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The root stays whole between forward and backward: the loss reads the head's weight outside of forward.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
