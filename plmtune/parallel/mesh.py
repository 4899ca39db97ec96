"""The device mesh of a layout, and the groups of processes that exchange numbers outside of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from plmtune.parallel.layout import DIMENSIONS, Layout


@dataclass(frozen=True)
class Processes:
    """The processes of a run, arranged as its layout says.

    Attributes:
        mesh: dimensions "pp", "replicate", "shard" and "tp", those of one process left out. "shard" counts dp_shard x
            cp: FSDP2 shares weights between all processes that have tokens of their own.
        tokens: the processes with the same part of the model, each with tokens of its own; gradients are averaged
            over them. None for one, as the others.
        model: the processes with the same tokens: those of pp x tp.
        cp: the processes that share a sequence.
    """

    layout: Layout
    mesh: DeviceMesh
    tokens: dist.ProcessGroup | None
    model: dist.ProcessGroup | None
    cp: dist.ProcessGroup | None

    def part(self, *names: str) -> DeviceMesh | None:
        """The mesh of some dimensions, without those of one process; None if none is left."""
        held = tuple(name for name in names if name in (self.mesh.mesh_dim_names or ()))
        return self.mesh[held] if held else None


def arrange(layout: Layout, device: torch.device, timeout: timedelta) -> Processes:
    """Make the mesh and the groups; every process must call it.

    Args:
        timeout: of exchanges within a dimension; groups do not inherit it.
    """
    everyone = dist.group.WORLD
    assert everyone is not None
    numbers = torch.arange(layout.num_processes).view([getattr(layout, name) for name in DIMENSIONS])
    pp, replicate, shard, cp, tp = range(5)

    def groups(*varying: int) -> dist.ProcessGroup:
        """The group of this process along some dimensions."""
        others = [dim for dim in range(5) if dim not in varying]
        size = int(torch.tensor([numbers.shape[dim] for dim in varying]).prod())
        if size == numbers.numel():
            return everyone
        lines = numbers.permute(*others, *varying).reshape(-1, size).tolist()
        mine, _ = dist.new_subgroups_by_enumeration(lines, timeout=timeout)
        return mine

    # FSDP2 replicates along the first of two dimensions, so it gets "shard" also of size one; DDP needs none.
    sharded = layout.shard_size > 1 or (layout.dp_replicate > 1 and not layout.whole_models)
    dims = {
        "pp": (layout.pp > 1, (pp,)),
        "replicate": (layout.dp_replicate > 1, (replicate,)),
        "shard": (sharded, (shard, cp)),
        "tp": (layout.tp > 1, (tp,)),
    }
    held = {name: along for name, (there, along) in dims.items() if there}
    mesh = DeviceMesh.from_group(
        [groups(*along) for along in held.values()],
        device.type,
        mesh=numbers.view([int(torch.tensor([numbers.shape[dim] for dim in along]).prod()) for along in held.values()]),
        mesh_dim_names=tuple(held),
    )
    return Processes(
        layout,
        mesh,
        tokens=groups(replicate, shard, cp) if layout.data_size * layout.cp > 1 else None,
        model=groups(pp, tp) if layout.pp * layout.tp > 1 else None,
        cp=groups(cp) if layout.cp > 1 else None,
    )
