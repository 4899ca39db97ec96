"""A model divided between the processes of a layout: tensor parallelism first, then FSDP2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plmtune.parallel.mesh import Processes
from plmtune.parallel.pipeline import Pipeline
from plmtune.parallel.tensor import apply_tensor_parallelism


def divide(model: Any, processes: Processes, dtype: torch.dtype) -> Any:
    """Divide a model, on the meta device or equal on every process.

    Returns:
        The same object; with a pipeline, on the meta device only, its stages of this process.

    Args:
        model: a Decoder, or a part of one; FSDP2 takes its `layers` one by one.
        dtype: what FSDP2 computes in; gradients are always reduced in fp32.
    """
    if processes.layout.pp > 1:
        model = Pipeline(model, processes, dtype)
    tp, shard, layout = processes.part("tp"), processes.part("replicate", "shard"), processes.layout
    if tp is not None:
        for part in model.parts if isinstance(model, Pipeline) else [model]:
            apply_tensor_parallelism(part, tp)
    if shard is not None:
        if isinstance(model, Pipeline):
            for stage in model.held.values():
                # Each micro-batch would gather the weights anew.
                _shard(stage, stage.part.layers, shard, dtype, reshard=False)
        else:
            _shard(model, getattr(model, "layers", ()), shard, dtype, reshard=layout.reshard_after_forward)
    elif isinstance(model, Pipeline) and dtype != torch.float32:
        model.autocast(dtype)
    return model


def _shard(
    model: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, dtype: torch.dtype, *, reshard: bool
) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a CPU second

    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The root stays whole between forward and backward: the loss reads the head's weight outside of forward.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
