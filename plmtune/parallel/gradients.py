"""Gradients of a divided model: sums that backward has left to do, and their norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plmtune.modules.sharding import full_tensor, is_sharded
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
    copies = getattr(model, "copies", ())
    counted = [p for p in parameters if id(p) not in copies]
    norm = total_norm(counted, processes)
    for group in _by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm or float("inf"), norm)
    return norm


def add_up_parts(parameters: Sequence[Tensor]) -> None:
    """Sum gradients of which each process of tensor parallelism has a part: those of whole weights."""
    for parameter in parameters:
        gradient = parameter.grad
        if is_sharded(parameter) and gradient is not None and is_sharded(gradient):
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def total_norm(parameters: list[nn.Parameter], processes: Processes) -> Tensor:
    """The norm of the gradients of all processes' parameters, each counted once."""
    gradients = [[p.grad for p in group if p.grad is not None] for group in _by_mesh(parameters)]
    norms = [full_tensor(torch.nn.utils.get_total_norm(group)) for group in gradients]
    device = norms[0].device if norms else torch.device(processes.mesh.device_type)
    squares = torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
    pp = processes.part("pp")
    if pp is not None:
        dist.all_reduce(squares, group=pp.get_group())
    return squares.sqrt()


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that one operation on DTensors may take together."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        key = (parameter.device_mesh,) if is_sharded(parameter) else None
        groups.setdefault(key, []).append(parameter)
    return list(groups.values())
