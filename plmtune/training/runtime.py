"""Where a recipe runs: device, arithmetic, seeds, and the processes that share the work."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import resource
import sys
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plmtune.errors import UserError
from plmtune.training import distributed
from plmtune.training.distributed import Strategy

Precision = Literal["auto", "bf16", "fp32"]


@dataclass
class Runtime:
    """The device and processes of one run. Made by `Runtime.start`, ended by `close` or a `with` block.

    Attributes:
        compute_dtype: of activations and matrix products; parameters and moments stay fp32.
        strategy: how the model is spread: "none", "ddp" or "fsdp".
        reasons: what was chosen and why, a line each.
    """

    device: torch.device
    compute_dtype: torch.dtype
    strategy: Strategy
    rank: int = 0
    world_size: int = 1
    reasons: list[str] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto",
        seed: int = 1,
        deterministic: bool = False,
        timeout_minutes: float = 10,
    ) -> Runtime:
        """Choose the device and the arithmetic, seed everything, and join the other processes of torchrun.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N".
            precision: "auto" takes bf16 where the hardware multiplies in it, else fp32.
            strategy: "auto" is "none" for one process and "ddp" for several.
            seed: of torch, numpy and python; the same on every rank, so that all build the same model.
            deterministic: refuse operations whose result depends on timing.
            timeout_minutes: how long a collective waits for a rank before the job ends.

        Raises:
            UserError: if the device is not there, or the strategy does not fit the number of processes.
        """
        rank, local_rank, world_size = distributed.environment()
        chosen_device, device_reason = _choose_device(device, local_rank)
        dtype, dtype_reason = _choose_precision(precision, chosen_device)
        chosen_strategy, strategy_reason = _choose_strategy(strategy, world_size)
        if deterministic:
            # cuBLAS reads this once, when its first handle is made.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = False
        if chosen_device.type == "cuda":
            torch.cuda.set_device(chosen_device)
        seed_everything(seed)
        reasons = [
            f"device: {device_reason}",
            f"precision: {dtype_reason}",
            f"strategy: {strategy_reason}",
            f"attention: {_attention_kernels(chosen_device)}",
            f"seed: {seed}" + (", deterministic algorithms only (slower)" if deterministic else ""),
        ]
        if world_size > 1 and not distributed.is_distributed():
            distributed.start_process_group(chosen_device, timeout_minutes)
        return cls(chosen_device, dtype, chosen_strategy, rank, world_size, reasons)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def gradient_scale(self) -> float:
        """Factor on each rank's loss: DDP and FSDP2 average gradients over ranks, and a loss that is already
        divided by the global count of tokens wants their sum.
        """
        return float(self.world_size)

    def distribute(self, model: nn.Module, *, compile: bool = False) -> nn.Module:
        """Move `model` to the device and spread it over the processes. Call it before the optimizer is built.

        Args:
            model: built alike on every rank; its blocks are in `model.layers`.
            compile: compile each block by itself, which is quick as all share one graph.

        Returns:
            What to call in training: the model itself, or a DDP wrapper around it.
        """
        model.to(self.device)
        if compile:
            for layer in getattr(model, "layers", ()):
                layer.compile()
        return distributed.wrap(model, self.strategy, self.device, self.compute_dtype)

    def accumulate(self, trained: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward of a micro-batch: ranks exchange gradients only for the `last` one of a step."""
        return distributed.accumulate(trained, last)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Compute in `compute_dtype`. FSDP2 casts by itself."""
        if self.compute_dtype == torch.float32 or self.strategy == "fsdp":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def clip_grad_norm(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Scale gradients down to `max_norm`; None or 0 only measures.

        Returns:
            The norm over all parameters and ranks before clipping, an fp32 scalar.
        """
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def sum(self, *values: Tensor | float) -> tuple[float, ...]:
        """Each value summed over ranks, in fp64: one exchange and one wait for the device for all of them."""
        # dtype given at once: as_tensor alone would round a Python float to fp32 on its way.
        stacked = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self.device).detach().reshape(()) for v in values]
        )
        return tuple(distributed.reduce_sum(stacked).tolist())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, as all ranks do together at the end."""
        if distributed.is_distributed():
            dist.destroy_process_group()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the others may wait in an exchange that this rank will never join, and leaving would
        # wait for them: let the error end this process, then torchrun ends theirs.
        if kind is None or kind is SystemExit:
            self.close()


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)  # seeds CUDA too
    np.random.seed(seed % 2**32)
    random.seed(seed)


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
        return (
            chosen,
            f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads ({why})",
        )
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
        return (torch.bfloat16 if precision == "bf16" else torch.float32), f"{precision} (asked for)"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16 (this GPU multiplies in it)"
        return torch.float32, "fp32 (this GPU has no bf16 units)"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "bf16 (this CPU has AMX or AVX512-BF16)"
    return torch.float32, "fp32 (this CPU has neither AMX nor AVX512-BF16)"


def _choose_strategy(strategy: str, world_size: int) -> tuple[Strategy, str]:
    processes = f"{world_size} process" + ("es" if world_size > 1 else "")
    if strategy == "auto":
        return ("ddp" if world_size > 1 else "none"), f"{'ddp' if world_size > 1 else 'none'} ({processes})"
    if strategy == "none" and world_size > 1:
        raise UserError(f"strategy=none cannot train one model on {world_size} processes. Use ddp, fsdp or auto.")
    if strategy in ("ddp", "fsdp"):
        if world_size == 1:
            return (
                "none",
                f"none ({strategy} was asked for, but there is one process: start more with torchrun)",
            )
        return ("ddp" if strategy == "ddp" else "fsdp"), f"{strategy} ({processes})"
    if strategy == "none":
        return "none", f"none ({processes})"
    raise UserError(f"strategy={strategy} is unknown. Use auto, none, ddp or fsdp.")


def _attention_kernels(device: torch.device) -> str:
    if device.type == "cpu":
        return "torch's fused CPU kernel"
    backends = {
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    return "torch chooses by shape from " + ", ".join(name for name, enabled in backends.items() if enabled)
