"""Copies of the tensors to save in host memory, divided among the ranks: training continues once they are made."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plmtune.io import safetensors_writer
from plmtune.modules.sharding import full_tensor
from plmtune.training import distributed


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
        self, stems: Mapping[str, Mapping[str, Tensor]], *, max_bytes: float, writers: Sequence[int]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Gather sharded tensors and bring each to the rank that writes it. Every rank must call it.

        Which file holds a tensor depends on names and sizes alone, so any number of processes writes the same files.

        Args:
            stems: tensors by name, sharded or not, for each beginning of file names.
            max_bytes: of a file.
            writers: the ranks to which files are dealt one by one.

        Returns:
            (tensors, indexes): of each file that this rank writes its tensors, and what each index file says.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        indexes: dict[str, Any] = {}
        turns = itertools.cycle(writers)
        for stem, named in stems.items():
            sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in named.items()}
            files = safetensors_writer.deal(sizes, stem, max_bytes)
            if len(files) > 1:
                indexes[f"{stem}.safetensors.index.json"] = safetensors_writer.index(files, sizes)
            for file, names in files.items():
                mine = next(turns) == distributed.rank()
                if mine:
                    tensors[file] = {}
                for name in names:
                    whole = full_tensor(named[name])
                    if mine:
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
