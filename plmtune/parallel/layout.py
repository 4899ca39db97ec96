"""How many processes each dimension of parallelism has. Nothing here needs a process group, or a weight."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["1f1b", "interleaved_1f1b", "zbv"]

# Of the device mesh, outermost first: neighbours in the last dimension exchange most, so they are in one machine.
DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """Sizes of five dimensions; their product is the number of processes. One process has all of size 1.

    Attributes:
        dp_replicate: copies of the model, whose gradients are all-reduced (DDP, or HSDP's outer dimension).
        dp_shard: processes that share weights, gradients and moments of a copy (FSDP2). Each process of both
            data dimensions has rows of its own.
        tp: processes that share each matrix by heads or columns, and each sequence between them (tensor and sequence
            parallelism, arXiv 1909.08053, 2205.05198).
        pp: stages of layers, one after the other (pipeline parallelism).
        cp: processes that share each sequence, and gather keys and values (context parallelism).
        schedule: the order of a pipeline's micro-batches: 1F1B (arXiv 2006.09503), interleaved 1F1B (arXiv 2104.04473)
            or ZBV (arXiv 2401.10241).
        reshard_after_forward: free gathered weights between forward and backward (ZeRO-3), or keep them (ZeRO-2).
            A pipeline always keeps them: each micro-batch would gather them anew.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    schedule: Schedule = "1f1b"
    reshard_after_forward: bool = True

    @property
    def num_processes(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp * self.pp * self.cp

    @property
    def data_size(self) -> int:
        """Processes with rows of their own, between which a global batch is divided."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard_size(self) -> int:
        """Processes that share weights, gradients and moments: context parallelism adds to FSDP2's."""
        return self.dp_shard * self.cp

    @property
    def whole_models(self) -> bool:
        """Whether each process has a whole model and whole rows of its own: one process, or DDP."""
        return self.num_processes == self.dp_replicate

    @property
    def strategy(self) -> str:
        """none, ddp, fsdp or hsdp, where data parallelism is all; else the sizes."""
        if self.tp * self.pp * self.cp > 1:
            return str(self)
        if self.whole_models:
            return "none" if self.dp_replicate == 1 else "ddp"
        return "fsdp" if self.dp_replicate == 1 else "hsdp"

    @property
    def stages_per_rank(self) -> int:
        """Stages that one process of the pipeline holds."""
        return 1 if self.pp == 1 or self.schedule == "1f1b" else 2

    @property
    def num_stages(self) -> int:
        return self.pp * self.stages_per_rank

    def stages_of(self, pp_rank: int) -> list[int]:
        """The stages of one process of the pipeline: r, r + pp of interleaved ones, r and the r-th last of ZBV."""
        if self.stages_per_rank == 1:
            return [pp_rank]
        return [pp_rank, 2 * self.pp - 1 - pp_rank if self.schedule == "zbv" else self.pp + pp_rank]

    def coordinates(self, rank: int) -> dict[str, int]:
        """The place of a rank in each dimension of the mesh."""
        found = {}
        for name in reversed(DIMENSIONS):
            rank, found[name] = divmod(rank, getattr(self, name))
        return found

    def __str__(self) -> str:
        sizes = [f"{name}={getattr(self, name)}" for name in DIMENSIONS if getattr(self, name) > 1]
        return " ".join([*sizes, *([self.schedule] if self.pp > 1 else [])]) or "1 process"


def layers_of_stages(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage: equal numbers, or one more in the middle ones, as the ends have the vocabulary.

    Raises:
        ValueError: if a stage would have none.
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} stages: each needs one")
    least, more = divmod(num_layers, num_stages)
    first_longer = (num_stages - more) // 2
    ends = [0]
    for stage in range(num_stages):
        ends.append(ends[-1] + least + (first_longer <= stage < first_longer + more))
    return [range(start, end) for start, end in itertools.pairwise(ends)]
