"""Our own checkpoints, quantized or not, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import plmtune
from plmtune.export.runtimes.base import DEFAULT_CONTEXT, InferenceRuntime
from plmtune.modules.decoder import Decoder


class PyTorchRuntime(InferenceRuntime):
    """A decoder over its cache.

    Args:
        context: tokens of the cache; None: the model's, at most 4,096.
    """

    name = "plmtune"

    def __init__(self, model: Decoder, context: int | None) -> None:
        self.model, self.vocab_size = model, model.vocab_size
        self.context = min(context or DEFAULT_CONTEXT, model.max_seq_len)
        self.cache = model.new_cache(1, self.context)

    def clear(self) -> None:
        self.cache.truncate(0)

    @torch.inference_mode()
    def read(self, ids: Sequence[int], last: int, top_k: int | None) -> Tensor:
        row = torch.tensor([list(ids)], device=self.model.device)
        return self.model.logits(self.model(row, cache=self.cache, hidden=True)[0, -last:])

    def close(self) -> None:
        del self.model, self.cache


def open_ours(path: Path, *, threads: int | None, context: int | None, exact: bool) -> PyTorchRuntime:
    """What `plmtune.load` gives.

    Args:
        threads: of PyTorch, for the whole process; None: as it is.
        exact: in fp32.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer = plmtune.load(path, dtype=torch.float32 if exact else None)
    opened = PyTorchRuntime(model, context)
    opened.path, opened.tokenizer = path, tokenizer
    return opened
