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

from plmtune import dtypes
from plmtune.config.sections import ParallelConfig
from plmtune.errors import UserError
from plmtune.modules.kernel_names import kernel_names
from plmtune.parallel.choose import Strategy, choose_layout, num_asked
from plmtune.parallel.context import ContextShard
from plmtune.parallel.divide import divide
from plmtune.parallel.gradients import clip_grad_norm
from plmtune.parallel.layout import Layout
from plmtune.parallel.mesh import Processes, arrange
from plmtune.training import distributed
from plmtune.training.state import seed_everything
from plmtune.units import show_number_of

Precision = Literal["auto", "bf16", "fp32"]


@dataclass
class Runtime(contextlib.AbstractContextManager["Runtime"]):
    """The device and processes of one run. `choose` makes it, `start` begins, and `close` or a `with` block ends it.

    Attributes:
        compute_dtype: of activations and matrix products; parameters and moments stay fp32.
        layout: how the processes share the work.
        timeout: how long an exchange waits for a rank.
        processes: the mesh and its groups; None for one process, and before `start`.
        reasons: what was chosen and why, a line each.
    """

    device: torch.device
    compute_dtype: torch.dtype
    layout: Layout = Layout()  # noqa: RUF009
    rank: int = 0
    timeout: timedelta = timedelta(minutes=10)
    processes: Processes | None = None
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
        strategy: Strategy = "auto",
        shard_size: int | None = None,
        parallel: ParallelConfig | None = None,
        planned: bool = False,
        seed: int = 1,
        deterministic: bool = False,
        timeout_minutes: float = 10,
    ) -> Runtime:
        """Choose the device, the precision and the strategy, without side effects.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N".
            precision: "auto" takes bf16 where the hardware multiplies in it, else fp32.
            strategy, shard_size, parallel: see `choose_layout`; "auto" is "none" for one process and "ddp" for several.
            planned: nothing will run: a single process stands for as many as the sizes make.
            seed: equal on every rank, so that all build the same model. After `distribute` each data rank has its own,
                so that dropout masks differ.
        """
        rank, local_rank, world_size = distributed.environment()
        where, on = _choose_device(device, local_rank)
        dtype, in_dtype = _choose_precision(precision, where)
        sizes = parallel or ParallelConfig()
        of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        if planned and world_size == 1:
            world_size = of_machine = num_asked(sizes)
        layout, by = choose_layout(sizes, strategy, shard_size, world_size=world_size, of_machine=of_machine)
        seeded = f"seed: {seed}" + (", deterministic algorithms only" if deterministic else "")
        reasons = [f"device: {on}", f"precision: {in_dtype}", f"strategy: {by}", seeded]
        if not 0 < timeout_minutes < 1e6:
            raise UserError(f"key runtime.timeout_minutes: must be above 0, not {timeout_minutes}.")
        timeout = timedelta(minutes=timeout_minutes)
        return cls(where, dtype, layout, rank, timeout, None, reasons, seed, deterministic)

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
            distributed.refuse_unequal_machines(self.layout)
            self.processes = arrange(self.layout, self.device, self.timeout)
        return self

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def world_size(self) -> int:
        return self.layout.num_processes

    @property
    def strategy(self) -> str:
        """none, ddp, fsdp, hsdp, or the sizes of a layout with more dimensions."""
        return self.layout.strategy

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this process takes. Processes that share rows have the same."""
        place = self.layout.coordinates(self.rank)
        return place["dp_replicate"] * self.layout.dp_shard + place["dp_shard"]

    @property
    def data_world_size(self) -> int:
        """Into how many parts the global batch is divided."""
        return self.layout.data_size

    @property
    def gradient_scale(self) -> float:
        """Factor on each rank's loss: it is divided by the global count, and DDP and FSDP2 average gradients over the
        processes that have tokens of their own."""
        return float(self.layout.data_size * self.layout.cp)

    @property
    def context(self) -> ContextShard | None:
        """The part of each sequence that this process has; None: all of it."""
        if self.processes is None or self.processes.cp is None:
            return None
        return ContextShard(self.layout.coordinates(self.rank)["cp"], self.layout.cp, self.processes.cp)

    def allocate(self, model: Any) -> Any:
        """Give a model on the meta device weights that are not set yet, on this process's device.

        Of a layout that divides the model each process allocates its part; with a pipeline that is its stages.
        """
        if not self.layout.whole_models:
            assert self.processes is not None
            return divide(model, self.processes, self.compute_dtype).to_empty(device=self.device)
        return model.to_empty(device=self.device)

    def distribute(self, model: nn.Module, *, compile: bool = False) -> nn.Module:
        """Move `model` to the device and distribute it. Call it before the optimizer is built.

        Args:
            model: equal on every rank, or of `allocate`; its blocks are in `model.layers`.
            compile: compile each block by itself, which is quick as all share one graph.

        Returns:
            What to call in training: the model itself, or a DDP wrapper around it.
        """
        model.to(self.device)
        if compile:
            for layer in getattr(model, "layers", ()):
                layer.compile()
        trained = distributed.wrap(model, self.processes, self.compute_dtype)
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
        if self.compute_dtype == torch.float32 or distributed.is_fsdp(self.processes):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def clip_grad_norm(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Scale gradients down to `max_norm`; None or 0 only measures.

        Returns:
            The norm over all parameters and ranks before clipping, an fp32 scalar, equal on every rank.
        """
        return clip_grad_norm(model, max_norm, self.processes)

    def sum(self, *values: Tensor | float) -> tuple[float, ...]:
        """Each value summed over the ranks that have tokens of their own, in fp64.

        It is one exchange for all values, on the device only if one of them is there.
        """
        on_device = any(isinstance(value, Tensor) and value.device == self.device for value in values)
        device = self.device if on_device else "cpu"
        # dtype given at once: as_tensor alone would round a Python float to fp32 on its way.
        numbers = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=device).detach().reshape(()) for v in values]
        )
        if self.processes is not None and self.processes.tokens is not None:
            dist.all_reduce(numbers, group=self.processes.tokens)
        return tuple(numbers.tolist())

    def over_model(self, values: Tensor) -> Tensor:
        """The mean of `values` over the processes that share each layer, summed over the stages of a pipeline."""
        if self.processes is not None and self.processes.model is not None:
            dist.all_reduce(values, group=self.processes.model)
            values /= self.layout.tp
        return values

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
