"""Tensor and sequence parallelism by torch's DTensor styles, as each module's `parallel_plan` says; see `plan`."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from plmtune.parallel.plan import full_plan


def apply_tensor_parallelism(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide a Decoder between the processes of a mesh of one dimension, in place.

    Its hidden states are whole again after the final norm; the head's weight is a DTensor, which losses read.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    class Whole(ParallelStyle):
        """Whole weights as DTensors, so that gradients of their parts are added up over the processes."""

        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            for name, parameter in list(module.named_parameters(recurse=False)):
                _replace(module, name, distribute_tensor(parameter.detach(), device_mesh, [Replicate()]), parameter)
            module.register_forward_pre_hook(self._as_whole)
            return module

        @staticmethod
        def _as_whole(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            first, *rest = inputs
            return (first if isinstance(first, DTensor) else DTensor.from_local(first, mesh, [Replicate()]), *rest)

    class Gathered(SequenceParallel):
        """A norm of the process's tokens whose output is gathered to the whole sequence, a plain tensor."""

        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            module = super()._apply(module, device_mesh)
            module.register_forward_hook(
                lambda module, inputs, output: output.redistribute(placements=[Replicate()]).to_local()
            )
            return module

    styles: dict[str, ParallelStyle] = {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(output_layouts=Shard(1)),
        "replicate": Whole(),
        "sequence": SequenceParallel(use_local_output=True),
        "heads": SequenceParallel(sequence_dim=2, use_local_output=True),
        "gather": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "embedding_whole": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "embedding_width": ColwiseParallel(),
        "sequence_gather": Gathered(),
    }
    rows = {"head": Shard(0), "parameter_rows": Shard(0), "parameter_whole": Replicate()}
    # The innermost first: a hook of a layer's attention must not be seen by its projections.
    for name, style in sorted(full_plan(model).items(), key=lambda item: -item[0].count(".")):
        owner, _, last = name.rpartition(".")
        parent = model.get_submodule(owner)
        held = getattr(parent, last, None) if not isinstance(parent, nn.ModuleDict) else parent[last]
        if held is None:
            continue
        if style in rows:
            module, key = (parent, last) if isinstance(held, nn.Parameter) else (held, "weight")
            parameter = getattr(module, key)
            _replace(module, key, distribute_tensor(parameter.detach(), mesh, [rows[style]]), parameter)
        else:
            parallelize_module(cast(nn.Module, held), mesh, styles[style])


def _replace(module: nn.Module, name: str, value: Tensor, old: nn.Parameter) -> None:
    module.register_parameter(name, nn.Parameter(value, requires_grad=old.requires_grad))
