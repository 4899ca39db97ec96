"""Gradients of a divided model: sums that backward has left to do, and their norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plmtune.modules.sharding import full_tensor, is_sharded, to_local
from plmtune.parallel.mesh import Processes


def clip_grad_norm(model: nn.Module, max_norm: float | None, processes: Processes | None) -> Tensor:
    """Scale the gradients of a step down to `max_norm`; None or 0 only measures.

    Returns:
        The norm over all parameters and processes before clipping, an fp32 scalar, equal on every process.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    if processes is None or processes.layout.tp * processes.layout.pp == 1:
        return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")))
    add_up_parts(parameters)
    norm = total_norm(model, parameters)
    if max_norm:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for parameter in parameters:
            assert parameter.grad is not None
            to_local(parameter.grad).mul_(factor)
    return norm


def add_up_parts(parameters: Sequence[Tensor]) -> None:
    """Sum gradients of which each process of tensor parallelism has a part: those of whole weights."""
    for parameter in parameters:
        gradient = parameter.grad
        if is_sharded(parameter) and gradient is not None and is_sharded(gradient):
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def total_norm(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of the gradients of all processes' parameters, each number counted once.

    One exchange between all processes, so that all get the same bits: DTensors would add up one dimension of the mesh
    after the other, in orders that may differ.
    """
    copies = getattr(model, "copies", ())
    counted = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or id(parameter) in copies:
            continue
        if is_sharded(gradient):
            mesh = gradient.device_mesh
            equal = [dim for dim, placement in enumerate(gradient.placements) if placement.is_replicate()]
            if any(mesh.get_local_rank(dim) for dim in equal):
                continue  # a process before this one has the same numbers
        counted.append(to_local(gradient))
    device = next(iter(parameters)).device
    norm = torch.nn.utils.get_total_norm(counted) if counted else torch.zeros((), device=device)
    square = norm.to(device, torch.float32).square()
    dist.all_reduce(square)
    return square.sqrt()
