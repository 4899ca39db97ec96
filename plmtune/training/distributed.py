"""Many processes: the group, the device mesh, how a model is spread, and how whole tensors come and go.

Everything that knows of ranks lives here, so that tensor and pipeline parallelism can come as further mesh
dimensions without a change in a recipe.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from plmtune.errors import UserError

Strategy = Literal["none", "ddp", "fsdp"]


def environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun gives them, or (0, 0, 1)."""
    get = os.environ.get
    return int(get("RANK", "0")), int(get("LOCAL_RANK", "0")), int(get("WORLD_SIZE", "1"))


def start_process_group(device: torch.device, timeout_minutes: float) -> None:
    """Join the other processes: nccl between GPUs, gloo between CPUs.

    Raises:
        UserError: if the rendezvous fails.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise UserError(
            f"The processes did not find each other ({backend}, MASTER_ADDR={os.environ.get('MASTER_ADDR')}, "
            f"MASTER_PORT={os.environ.get('MASTER_PORT')}): {error}. Start them with torchrun."
        ) from error


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def data_mesh(device: torch.device) -> DeviceMesh:
    """One dimension, "data": replicas or shards of the model, each with its own rows of the global batch."""
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))


def wrap(model: nn.Module, strategy: Strategy, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Spread `model` over the processes of the group.

    Args:
        model: on `device`; rank 0's values count, the others receive them.
        strategy: "ddp" replicates, "fsdp" shards parameters, gradients and optimizer state (FSDP2).
        dtype: what FSDP2 computes in; gradients are always reduced in fp32.

    Returns:
        What to call: a DDP wrapper, or the same object under FSDP2.
    """
    if strategy == "none":
        return model
    if strategy == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    mesh = data_mesh(device)
    for layer in getattr(model, "layers", ()):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # The root stays whole between forward and backward: the loss reads the head's weight outside of forward.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


@contextlib.contextmanager
def accumulate(model: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward of one micro-batch: gradients travel between ranks only for the last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)  # read in backward, which may run after this block
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def group_device() -> torch.device:
    """Where a tensor must live to travel: nccl wants the GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def reduce_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place; itself for one process."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on one. Every rank must call it."""
    if not is_distributed():
        return flag
    value = torch.tensor(int(flag), device=group_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_texts(text: str) -> list[str]:
    """One text of each rank, in order of rank. Bytes travel, not pickles."""
    if not is_distributed():
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    device = group_device()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data.to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [bytes(part[: int(size)].cpu().numpy()).decode() for part, size in zip(parts, sizes, strict=True)]


def broadcast_text(text: str) -> str:
    """Rank 0's text on every rank."""
    if not is_distributed():
        return text
    device = group_device()
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, src=0)
    if rank() != 0:
        data = torch.zeros(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return bytes(data.cpu().numpy()).decode()


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The name of each parameter. A shared parameter has its first name."""
    if isinstance(model, FSDPModule):
        # A forward without backward (a validation) leaves the root whole, with stand-ins for its parameters.
        model.reshard()
    return {parameter: name for name, parameter in model.named_parameters()}


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on the host. Every rank must call it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


def like(value: Tensor, example: Tensor) -> Tensor:
    """A copy of `value` (whole, on every rank), placed and sharded as `example` is."""
    if not isinstance(example, DTensor):
        return value.to(example.device, copy=True)
    mesh, placements = example.device_mesh, example.placements
    # No rank needs to send: each read the same file.
    sharded = distribute_tensor(value.to(example.device), mesh, placements, src_data_rank=None)
    # The local part is a view; its copy lets go of the whole.
    local = sharded.to_local().clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of `model`, whole and on the host; empty on ranks other than 0. All must call it."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = full_tensor(tensor)
        if rank() == 0:
            state[name] = whole
    return state


def load_full_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into `model`, whatever its sharding.

    Raises:
        UserError: if a tensor is missing or has another shape.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            value = state.get(name)
            if value is None:
                raise UserError(f"The checkpoint has no tensor {name}, which the model needs.")
            if value.shape != tensor.shape:
                raise UserError(
                    f"Tensor {name} has the shape {list(value.shape)} in the checkpoint "
                    f"and {list(tensor.shape)} in the model."
                )
            tensor.copy_(like(value.to(tensor.dtype), tensor))
