"""Many processes: the process group, distributing a model, and exchanges between ranks. See docs/distributed.md."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from plmtune import dtypes
from plmtune.errors import UserError
from plmtune.modules.sharding import is_sharded, shard_like
from plmtune.parallel.divide import divide
from plmtune.parallel.layout import Layout
from plmtune.parallel.mesh import Processes
from plmtune.parallel.pipeline import Pipeline

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

# After a failed exchange, how long a rank waits for the other ranks' reports.
PEER_REPORT_SECONDS = 3.0

RENDEZVOUS_KEY = "plmtune"  # the key of torchrun's store that names the round, see _rendezvous

_store: dist.Store | None = None  # where ranks leave reports for each other when exchanges fail
_restarted = False


def environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun gives them, or (0, 0, 1)."""
    get = os.environ.get
    return int(get("RANK", "0")), int(get("LOCAL_RANK", "0")), int(get("WORLD_SIZE", "1"))


def start_process_group(device: torch.device, timeout: timedelta) -> None:
    """Join the other processes. Tensors on GPUs are exchanged over nccl, those on the host over gloo.

    So exchanging the flags, texts and numbers of each step does not wait for the GPU's queue.
    """
    global _store, _restarted
    cuda = device.type == "cuda"
    rank, _, world = environment()
    try:
        store, *_ = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        _restarted = "TORCHELASTIC_RUN_ID" in os.environ and store.check([RENDEZVOUS_KEY])
        _store = _rendezvous(store, rank, world, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=_store,
            rank=rank,
            world_size=world,
            timeout=timeout,
            device_id=device if cuda else None,
        )
    except (RuntimeError, ValueError) as error:
        # Errors of torch's store have many lines.
        raise UserError(
            f"The {world} processes did not find each other within {timeout.total_seconds():g} seconds "
            f"(runtime.timeout_minutes) at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
            f"{str(error).splitlines()[0].rstrip('.')}. "
            "Start all of them with torchrun, and look for the error of the one that is missing."
        ) from error


def _rendezvous(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Return a part of `store` for these processes alone.

    torchrun's store outlives its workers, and each machine counts only its own restarts. So rank 0 names each round of
    workers, and the others wait until rank 0 has seen them under that name.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    places, round_ = [f"here/{other}" for other in range(world)], None
    if rank == 0:
        store.set(RENDEZVOUS_KEY, mine)
    while time.monotonic() < deadline:
        if store.check([RENDEZVOUS_KEY]):  # of an earlier round until rank 0 has joined
            round_ = dist.PrefixStore(store.get(RENDEZVOUS_KEY).decode(), store)
            round_.set(places[rank], mine)
            if rank == 0 and round_.check(places):
                round_.set("all", " ".join(round_.get(place).decode() for place in places))
            if round_.check(["all"]) and mine in round_.get("all").decode().split():
                return round_
        time.sleep(0.05)
    absent = [other for other in range(world) if round_ and not round_.check([places[other]])]
    raise RuntimeError(f"{_ranks(absent or [0])} did not join")


def restarted() -> bool:
    """On rank 0, whether torchrun restarted these processes."""
    # Each machine counts its own restarts; those of another machine show in the store.
    return _restarted or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def explain(error: BaseException, timeout: timedelta) -> None:
    """Find out which rank is missing, if `error` is a failed exchange between processes; else do nothing.

    Each rank whose exchange failed reports where it was, and looks for the others' reports: a rank without one is
    dead, hangs, or ended with an error of its own. After a timeout the result is added to `error` as a note.

    Raises:
        UserError: if a connection broke instead. torchrun then reports how the other rank ended, which explains more
            than a traceback of this one.
    """
    # Errors of gloo have no class of their own, but name its source.
    of_exchange = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
    if _store is None or not of_exchange:
        return
    others = {other for other in range(world_size()) if other != rank()}
    places: dict[int, str] = {}
    with contextlib.suppress(RuntimeError):  # the store is gone if the process that holds it is
        _store.set(f"failed/{rank()}", _place(error))
        deadline = time.monotonic() + PEER_REPORT_SECONDS
        while len(places) < len(others) and time.monotonic() < deadline:
            time.sleep(0.05)
            places |= {o: _store.get(f"failed/{o}").decode() for o in others if _store.check([f"failed/{o}"])}
    silent = _ranks(sorted(others - places.keys()))
    waited = [f"rank {other} in {place}" for other, place in sorted(places.items())]
    also = f" Others waited too: {', '.join(waited)}." if waited else ""
    if "imed out" not in str(error):
        lost = silent or "another rank"
        raise UserError(
            f"Rank {rank()} lost {lost} in {_place(error)}: its process ended or its machine cannot be reached.{also} "
            "Its own error, or how it ended, is in the report of torchrun. The run can be resumed."
        ) from error
    error.add_note(
        f"Rank {rank()} waited {timeout.total_seconds():g} seconds (runtime.timeout_minutes) in {_place(error)} for "
        + (f"{silent}, which did not answer: stopped, hanging, or much slower." if silent else "ranks elsewhere.")
        + also
    )


def _place(error: BaseException) -> str:
    """The innermost function outside of torch that `error` came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename]
    return f"{frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else "torch"


def _ranks(numbers: list[int]) -> str:
    """No text for none; "rank 1"; "ranks 1 and 3"."""
    if len(numbers) < 2:
        return "".join(f"rank {number}" for number in numbers)
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def refuse_unequal_machines(layout: Layout) -> None:
    """Refuse machines with different numbers of processes, where neighbours of a layout shall be in one machine.

    Every process must call it.
    """
    local = sorted({int(text) for text in gather_texts(os.environ.get("LOCAL_WORLD_SIZE", "0"))})
    if len(local) > 1 and not layout.whole_models:
        raise UserError(
            f"key parallel: {layout} needs machines with equally many processes, and some have {local[0]}, others "
            f"{local[-1]}. Give torchrun the same --nproc-per-node everywhere."
        )


def is_fsdp(processes: Processes | None) -> bool:
    """Whether FSDP2 holds the parameters."""
    return processes is not None and "shard" in (processes.mesh.mesh_dim_names or ())


def wrap(model: nn.Module, processes: Processes | None, dtype: torch.dtype) -> nn.Module:
    """Distribute `model` over the processes, as their layout says.

    Args:
        model: on its device; every rank gets rank 0's values. One that `parallel.divide` has divided stays as it is.
        processes: None for one.
        dtype: what FSDP2 computes in; gradients are always reduced in fp32.

    Returns:
        What to call: a DDP wrapper, or the same object.
    """
    if processes is None:
        return model
    if processes.layout.whole_models:
        return DistributedDataParallel(
            model,
            process_group=processes.tokens,
            device_ids=[torch.cuda.current_device()] if processes.mesh.device_type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
    if not isinstance(model, Pipeline) and not any(is_sharded(parameter) for parameter in model.parameters()):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, src=0)
        divide(model, processes, dtype)
    return model


@contextlib.contextmanager
def accumulate(model: nn.Module, *, first: bool, last: bool) -> Iterator[None]:
    """Around the forward of one micro-batch; its backward may run inside or after.

    Ranks exchange gradients in the backward of the last one only. Under FSDP2 unreduced gradients and gathered
    parameters stay in memory from a step's first forward to its last backward: one all-gather and one reduce-scatter
    (HSDP: and one all-reduce) for each group of parameters in a step. That takes 4 bytes a parameter of the whole
    model for gradients, and the compute dtype's bytes for parameters; with one micro-batch a step, a layer or two.
    """
    if isinstance(model, _fsdp_module()):
        # Backward reads these two, and the last micro-batch restores them.
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        _reshard_layers_after_forward(model, first and last)
        try:
            yield
        finally:  # a validation between steps frees each layer again
            _reshard_layers_after_forward(model, True)
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def _fsdp_module() -> tuple[type[FSDPModule], ...]:
    """FSDP2's class of modules, for isinstance; empty where `wrap` has not imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (fsdp.FSDPModule,) if fsdp else ()


def _reshard_layers_after_forward(model: nn.Module, value: bool) -> None:
    for module in model.modules():
        if isinstance(module, _fsdp_module()) and module is not model:
            module.set_reshard_after_forward(value, recurse=False)


def reduce_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place; one process's values stay as they are."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on one. Every rank must call it."""
    if not is_distributed():
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_texts(text: str) -> list[str]:
    """The text of each rank, in order of rank. Bytes are exchanged, not pickles."""
    if not is_distributed():
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [bytes(part[: int(size)].numpy()).decode() for part, size in zip(parts, sizes, strict=True)]


@dataclass(frozen=True)
class Held:
    """A tensor that some ranks hold: its whole shape, its dtype, and the first rank of those."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rank: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def catalogue(named: Mapping[str, Tensor], order: Sequence[str] | None = None) -> dict[str, Held]:
    """The tensors of all ranks by name; every rank must call it. Stages of a pipeline hold different ones.

    Args:
        named: this rank's, sharded or not.
        order: names in the order of the whole model, of which each tensor's is one, or one with "/..." after it. None:
            every rank has the same names, in their order.
    """
    own = {name: [list(tensor.shape), dtypes.code_of(tensor.dtype)] for name, tensor in named.items()}
    if order is None:
        return {name: Held(tuple(t.shape), t.dtype, rank()) for name, t in named.items()}
    found: dict[str, Held] = {}
    for number, text in enumerate(gather_texts(json.dumps(own))):
        for name, (shape, code) in json.loads(text).items():
            found.setdefault(name, Held(tuple(shape), dtypes.from_code(code), number))
    places = {name: place for place, name in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: places[item[0].partition("/")[0]]))


def broadcast_from_rank0(decide: Callable[[], Any]) -> Any:
    """Call `decide` on rank 0; every rank must call this, and gets its result, as JSON, or its UserError."""
    answer, failure = None, ""
    if rank() == 0:
        try:
            answer = decide()
        except UserError as error:
            failure = str(error)
    answer, failure = json.loads(gather_texts(json.dumps([answer, failure]))[0])
    if failure:
        raise UserError(failure)
    return answer


def once_per_machine(do: Callable[[], T]) -> T:
    """Call `do`, which downloads, on one process of each machine, then on the others, which find the files there.

    Every rank must call it; a UserError of one is raised on all.
    """
    first, given = environment()[1] == 0, list[T]()
    for turn in (True, False):
        failure = ""
        try:
            if first is turn:
                given.append(do())
        except UserError as error:
            failure = str(error)
        if any_rank(bool(failure)):
            raise UserError(next(filter(None, gather_texts(failure))))
    return given[0]


def barrier() -> None:
    """Wait for all processes, on the host."""
    any_rank(False)


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The name of each parameter. A shared parameter has its first name."""
    if isinstance(model, _fsdp_module()):
        # After a forward without backward (a validation) the root is unsharded, and its parameters are others. A
        # pipeline does that itself.
        model.reshard()
    return {parameter: name for name, parameter in model.named_parameters()}


def like(value: Tensor, example: Tensor) -> Tensor:
    """A copy of `value` (whole, on every rank), placed and sharded as `example` is."""
    if not is_sharded(example):
        return value.to(example.device, copy=True)
    # The local part is a view; a copy of it frees the whole tensor.
    return with_local(shard_like(value, example).to_local().clone(), example)


def with_local(local: Tensor, example: DTensor) -> DTensor:
    """`local` as this rank's part of a tensor that is sharded as `example` is."""
    from torch.distributed.tensor import DTensor

    mesh, placements, shape = example.device_mesh, example.placements, example.shape
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=example.stride())


def load_full_tensors(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into `targets`, a model's tensors by name, sharded or not."""
    with torch.no_grad():
        for name, tensor in targets.items():
            value = state.get(name)
            if value is None:
                raise UserError(f"The checkpoint has no tensor {name}, which the model needs.")
            if value.shape != tensor.shape:
                raise UserError(
                    f"Tensor {name} has the shape {list(value.shape)} in the checkpoint "
                    f"and {list(tensor.shape)} in the model."
                )
            tensor.copy_(like(value.to(tensor.dtype), tensor))
