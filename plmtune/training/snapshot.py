"""Copies of the tensors to save in host memory, divided among the ranks: training continues once they are made."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plmtune.io import safetensors_writer
from plmtune.modules.sharding import full_tensor
from plmtune.training import distributed
from plmtune.training.distributed import Held


@dataclass
class SnapshotBuffers:
    """Takes snapshots, in buffers that are reused: allocating them takes ten times as long as the copy.

    Args:
        copies: copy, so that training may change the tensors while they are written. False: tensors that are whole
            and on the host are written as they are.
    """

    copies: bool
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def take(
        self,
        stems: Mapping[str, Mapping[str, Tensor]],
        held: Mapping[str, Mapping[str, Held]],
        *,
        max_bytes: float,
        writers: Sequence[int],
        stage_size: int,
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Gather sharded tensors and bring each to the rank that writes it. Every rank must call it.

        Which file holds a tensor depends on names and sizes alone, so any number of processes writes the same files.

        Args:
            stems: this rank's tensors by name, sharded or not, for each beginning of file names.
            held: all ranks' tensors, by the same names.
            max_bytes: of a file.
            writers: the ranks to which files are dealt one by one.
            stage_size: ranks of one stage of a pipeline, which have neighbouring numbers; without one, all.

        Returns:
            (tensors, indexes): of each file that this rank writes its tensors, and what each index file says.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        indexes: dict[str, Any] = {}
        turns = itertools.cycle(writers)
        for stem, named in stems.items():
            sizes = {name: tensor.num_bytes for name, tensor in held[stem].items()}
            files = safetensors_writer.deal(sizes, stem, max_bytes)
            if len(files) > 1:
                indexes[f"{stem}.safetensors.index.json"] = safetensors_writer.index(files, sizes)
            for file, names in files.items():
                writer = next(turns)
                if writer == distributed.rank():
                    tensors[file] = {}
                for name in names:
                    whole = _brought(named.get(name), held[stem][name], writer, stage_size)
                    if writer == distributed.rank():
                        assert whole is not None
                        tensors[file][name] = self._on_host(f"{stem}/{name}", whole.detach())
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies are asynchronous
        return tensors, indexes

    def _on_host(self, name: str, tensor: Tensor) -> Tensor:
        if not self.copies:
            return tensor.cpu()
        on_gpu, buffer = tensor.device.type == "cuda", self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=on_gpu)


def _brought(tensor: Tensor | None, held: Held, writer: int, stage_size: int) -> Tensor | None:
    """The whole of a tensor on the writer's rank, from the stage that holds it. Every rank must call it."""
    whole = None if tensor is None else full_tensor(tensor)
    # The rank of that stage with the writer's place in it.
    sender = held.rank // stage_size * stage_size + writer % stage_size
    if writer == sender or distributed.rank() not in (writer, sender):
        return whole
    if distributed.rank() == sender:
        assert whole is not None
        dist.send(whole.detach().contiguous().cpu(), writer)
        return None
    if whole is None:
        whole = torch.empty(held.shape, dtype=held.dtype)
        dist.recv(whole, sender)
        return whole
    dist.recv(torch.empty(held.shape, dtype=held.dtype), sender)  # a tied weight, which both stages have
    return whole
