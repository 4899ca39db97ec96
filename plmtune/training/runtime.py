"""Where a recipe runs: device, precision, seeds and processes."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from plmtune import dtypes
from plmtune.errors import UserError
from plmtune.modules.kernel_names import kernel_names
from plmtune.modules.sharding import full_tensor
from plmtune.training import distributed
from plmtune.training.distributed import Strategy
from plmtune.training.state import seed_everything
from plmtune.units import show_number_of

Precision = Literal["auto", "bf16", "fp32"]


@dataclass
class Runtime(contextlib.AbstractContextManager["Runtime"]):
    """The device and processes of one run. `choose` makes it, `start` begins, and `close` or a `with` block ends it.

    Attributes:
        compute_dtype: of activations and matrix products; parameters and moments stay fp32.
        shard_size: processes that share one copy of the model.
        timeout: how long an exchange waits for a rank.
        mesh: the processes in their dimensions; None for one process, and before `start`.
        reasons: what was chosen and why, a line each.
    """

    device: torch.device
    compute_dtype: torch.dtype
    strategy: Strategy
    rank: int = 0
    world_size: int = 1
    shard_size: int = 1
    timeout: timedelta = timedelta(minutes=10)
    mesh: DeviceMesh | None = None
    reasons: list[str] = field(default_factory=list)
    seed: int = 1
    deterministic: bool = False
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False, compare=False)

    @classmethod
    def choose(
        cls,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto",
        shard_size: int | None = None,
        seed: int = 1,
        deterministic: bool = False,
        timeout_minutes: float = 10,
    ) -> Runtime:
        """Choose the device, the precision and the strategy, without side effects.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N".
            precision: "auto" takes bf16 where the hardware multiplies in it, else fp32.
            strategy: "auto" is "none" for one process and "ddp" for several.
            shard_size: of hsdp; None: the processes of one machine.
            seed: equal on every rank, so that all build the same model. After `distribute` each data rank has its own,
                so that dropout masks differ.
        """
        rank, local_rank, world_size = distributed.environment()
        where, on = _choose_device(device, local_rank)
        dtype, in_dtype = _choose_precision(precision, where)
        how, size, by = _choose_strategy(strategy, shard_size, world_size)
        seeded = f"seed: {seed}" + (", deterministic algorithms only" if deterministic else "")
        reasons = [f"device: {on}", f"precision: {in_dtype}", f"strategy: {by}", seeded]
        if not 0 < timeout_minutes < 1e6:
            raise UserError(f"key runtime.timeout_minutes: must be above 0, not {timeout_minutes}.")
        timeout = timedelta(minutes=timeout_minutes)
        return cls(where, dtype, how, rank, world_size, size, timeout, None, reasons, seed, deterministic)

    def start(self) -> Runtime:
        """Seed everything, and join the other processes of torchrun; returns itself, for a `with` block."""
        if self.deterministic:
            # cuBLAS reads this once, when its first handle is made.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports inductor: a second
            torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.benchmark = False
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        seed_everything(self.seed)
        if self.world_size > 1:
            if not distributed.is_distributed():
                distributed.start_process_group(self.device, self.timeout)
            self.mesh = distributed.data_mesh(self.device, self.shard_size, self.timeout)
        return self

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this process takes. Processes of one tensor dimension would share it."""
        return self.rank

    @property
    def data_world_size(self) -> int:
        """Into how many parts the global batch is divided."""
        return self.world_size

    @property
    def gradient_scale(self) -> float:
        """Factor on each rank's loss: it is divided by the global count, and DDP and FSDP2 average gradients."""
        return float(self.data_world_size)

    def distribute(self, model: nn.Module, *, compile: bool = False) -> nn.Module:
        """Move `model` to the device and distribute it. Call it before the optimizer is built.

        Args:
            model: equal on every rank; its blocks are in `model.layers`.
            compile: compile each block by itself, which is quick as all share one graph.

        Returns:
            What to call in training: the model itself, or a DDP wrapper around it.
        """
        model.to(self.device)
        if compile:
            for layer in getattr(model, "layers", ()):
                layer.compile()
        trained = distributed.wrap(model, self.strategy, self.mesh, self.compute_dtype)
        if self.data_rank:  # other rows, other dropout masks
            seed_everything(self.seed + self.data_rank)
        return trained

    def accumulate(self, trained: nn.Module, *, first: bool, last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of a micro-batch's forward, see `distributed.accumulate`."""
        return distributed.accumulate(trained, first=first, last=last)

    def attention_kernels(self, model: nn.Module, *, seq_len: int, masked: bool = False, segments: bool = False) -> str:
        """Name what attention of these sequences runs through here, in training; see `kernel_names`."""
        dtype, device = self.compute_dtype, self.device
        return kernel_names(model, seq_len=seq_len, dtype=dtype, device=device, masked=masked, segments=segments)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Compute in `compute_dtype`. FSDP2 casts by itself."""
        if self.compute_dtype == torch.float32 or self.strategy in ("fsdp", "hsdp"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def clip_grad_norm(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Scale gradients down to `max_norm`; None or 0 only measures.

        Returns:
            The norm over all parameters and ranks before clipping, an fp32 scalar.
        """
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
        return full_tensor(norm)

    def sum(self, *values: Tensor | float) -> tuple[float, ...]:
        """Each value summed over ranks, in fp64: one exchange for all, on the device only if one of them is there."""
        on_device = any(isinstance(value, Tensor) and value.device == self.device for value in values)
        device = self.device if on_device else "cpu"
        # dtype given at once: as_tensor alone would round a Python float to fp32 on its way.
        numbers = [torch.as_tensor(v, dtype=torch.float64, device=device).detach().reshape(()) for v in values]
        return tuple(distributed.reduce_sum(torch.stack(numbers)).tolist())

    def hold(self, opened: contextlib.AbstractContextManager[object]) -> None:
        """Exit `opened` at the end of this runtime's `with` block, with the error that ends it, if there is one."""
        self._held.push(opened)

    def close(self) -> None:
        """Leave the process group, as all ranks do together at the end."""
        if distributed.is_distributed():
            dist.destroy_process_group()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: Any) -> None:
        self._held.__exit__(kind, error, *trace)
        # After an error the others may wait in an exchange that this rank never joins, and leaving the group would
        # wait for them. The error ends this process, and torchrun then ends theirs.
        if kind is None or kind is SystemExit:
            self.close()
        elif error is not None:
            distributed.explain(error, self.timeout)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _choose_device(device: str, local_rank: int) -> tuple[torch.device, str]:
    name = "cuda" if device == "auto" and torch.cuda.is_available() else device
    name = "cpu" if name == "auto" else name
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={device} is no device. Use auto, cpu, cuda or cuda:0.") from error
    if chosen.type == "cpu":
        why = "no GPU found" if device == "auto" else "asked for"
        threads = show_number_of(torch.get_num_threads(), "thread")
        return chosen, f"{platform.processor() or platform.machine()} CPU, {threads} ({why})"
    if chosen.type != "cuda":
        raise UserError(f"device={device} is not supported. Use auto, cpu, cuda or cuda:0.")
    index = local_rank if chosen.index is None else chosen.index
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(f"device={device} needs GPU {index}, and this machine has {count}. Use device=cpu or auto.")
    properties = torch.cuda.get_device_properties(index)
    return torch.device("cuda", index), f"cuda:{index}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _choose_precision(precision: Precision, device: torch.device) -> tuple[torch.dtype, str]:
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision={precision} is unknown. Use auto, bf16 or fp32.")
    if precision != "auto":
        return dtypes.from_name(precision), f"{precision} (asked for)"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16 (this GPU multiplies in it)"
        return torch.float32, "fp32 (this GPU has no bf16 units)"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "bf16 (this CPU has AMX or AVX512-BF16)"
    return torch.float32, "fp32 (this CPU has neither AMX nor AVX512-BF16)"


def _choose_strategy(strategy: str, shard_size: int | None, world_size: int) -> tuple[Strategy, int, str]:
    """(strategy, processes that share a copy of the model, why)."""
    if strategy not in ("auto", "none", "ddp", "fsdp", "hsdp"):
        raise UserError(f"strategy={strategy} is unknown. Use auto, none, ddp, fsdp or hsdp.")
    if strategy != "hsdp" and shard_size is not None:
        raise UserError(f"shard_size={shard_size} belongs to strategy=hsdp; with {strategy}, leave it out.")
    if world_size == 1:
        asked = strategy in ("ddp", "fsdp", "hsdp")
        why = f"{strategy} was asked for, but there is one process: start more with torchrun" if asked else "1 process"
        return "none", 1, f"none ({why})"
    if strategy == "none":
        raise UserError(f"strategy=none cannot train one model on {world_size} processes. Use ddp, fsdp or auto.")
    if strategy == "fsdp":
        return "fsdp", world_size, f"fsdp ({world_size} processes)"
    if strategy == "hsdp":
        size = _choose_shard_size(shard_size, world_size)
        return "hsdp", size, f"hsdp ({world_size // size} copies of the model, each on {size} processes)"
    return "ddp", 1, f"ddp ({world_size} processes)"


def _choose_shard_size(shard_size: int | None, world_size: int) -> int:
    size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if shard_size is None else shard_size
    given = f"shard_size={size}" + (", the processes of this machine," if shard_size is None else "")
    instead = "" if shard_size else " or give shard_size a divisor of them"
    if size < 1 or world_size % size:
        raise UserError(f"strategy=hsdp: {given} does not divide {world_size} processes.")
    if size == 1:
        raise UserError(f"strategy=hsdp: {given} shards nothing, which is ddp. Use strategy=ddp{instead}.")
    if size == world_size:
        raise UserError(f"strategy=hsdp: {given} makes one copy of all, which is fsdp. Use strategy=fsdp{instead}.")
    return size
