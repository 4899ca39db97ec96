"""Our own checkpoints, quantized or not, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import plmtune
from plmtune.export.runtimes.base import DEFAULT_CONTEXT, InferenceRuntime
from plmtune.modules.cache import Cache


class PyTorchRuntime(InferenceRuntime):
    """What `plmtune.load` gives; decoding over its cache.

    Args:
        threads: of PyTorch, for the whole process; None: as it is.
        context: None: the model's, at most 4,096.
        exact: in fp32.
    """

    name = "plmtune"

    def __init__(self, path: Path, *, threads: int | None, context: int | None, exact: bool) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.path = path
        self.model, self.tokenizer = plmtune.load(path, dtype=torch.float32 if exact else None)
        self.vocab_size = self.model.vocab_size
        self.context = min(context or DEFAULT_CONTEXT, self.model.max_seq_len)
        self._cache: Cache | None = None

    @torch.inference_mode()
    def log_probs(self, ids: Sequence[int], last: int, top_k: int | None = None) -> Tensor:
        self.check(ids, last)
        hidden = self.model(self._row(ids), hidden=True)[0, -last:]
        return self.model.logits(hidden).log_softmax(-1).cpu()

    @torch.inference_mode()
    def start(self, ids: Sequence[int]) -> int:
        self.check(ids)
        if self._cache is None:
            self._cache = self.model.new_cache(1, self.context)
        self._cache.truncate(0)
        return self._next(ids)

    @torch.inference_mode()
    def step(self, id: int) -> int:
        return self._next([id])

    def _next(self, ids: Sequence[int]) -> int:
        hidden = self.model(self._row(ids), cache=self._cache, hidden=True)[0, -1:]
        return int(self.model.logits(hidden).argmax())

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.model.device)

    def close(self) -> None:
        self._cache = None
        del self.model
