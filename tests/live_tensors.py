"""Counts the bytes of the tensors that operations make, for as long as they are there."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveTensors(TorchDispatchMode):
    """In its block: `nbytes` of the storages made since, and still there, and the `peak` of them after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[Any, int]] = {}
        self.peak = 0
        self._at_most = 0  # as nothing was freed since the storages were last looked at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                self._forget(storage._cdata)
                self._seen[storage._cdata] = (storage._weak_ref(), storage.nbytes())
                self._at_most += storage.nbytes()
                if self._at_most > self.peak:
                    self._at_most = self.nbytes
                    self.peak = max(self.peak, self._at_most)
        return output

    @property
    def nbytes(self) -> int:
        for key in [key for key, (ref, _) in self._seen.items() if torch.UntypedStorage._expired(ref)]:
            self._forget(key)
        return sum(size for _, size in self._seen.values())

    def _forget(self, key: int) -> None:
        if key in self._seen:
            torch.UntypedStorage._free_weak_ref(self._seen.pop(key)[0])

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for key in list(self._seen):
            self._forget(key)
