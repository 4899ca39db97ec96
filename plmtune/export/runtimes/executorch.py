"""Programs for ExecuTorch, by its Python runtime; `export.executorch` says what such a file holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.export.runtimes.base import InferenceRuntime
from plmtune.io.terminal import track
from plmtune.models.checkpoint_files import read_json
from plmtune.tokenizers.tokenizer_files import load_tokenizer


def read_facts(path: Path) -> tuple[int, int, list[str]]:
    """Read the JSON beside a .pte file: rows of the vocabulary, positions of the cache, formats of the numbers."""
    beside = path.with_name(f"{path.name}.json")
    if not beside.is_file():
        raise UserError(f"{path} lacks {beside.name} beside it, which holds the size of its vocabulary. Copy it too.")
    facts = read_json(beside.parent, beside.name)
    rows, positions, formats = (facts.get(key) for key in ("vocab_size", "max_seq_len", "formats"))
    if type(rows) is not int or type(positions) is not int or not isinstance(formats, list) or not formats:
        raise UserError(f"{beside} lacks vocab_size, max_seq_len or formats: plmtune export did not write it.")
    return rows, positions, list(map(str, formats))


class ExecuTorchRuntime(InferenceRuntime):
    """A program of one token a call, its cache inside.

    Args:
        threads: None: ExecuTorch's own choice, which is all it can take from Python.
        context: None: what the program was made for.
    """

    name = "ExecuTorch"

    def __init__(self, path: Path, *, threads: int | None, context: int | None, exact: bool) -> None:
        from executorch.runtime import Runtime as Engine

        if threads is not None:
            from executorch.extension.pybindings import portable_lib

            # Not in every build: then the program takes the threads it takes.
            limit = getattr(portable_lib, "_unsafe_reset_threadpool", None)
            if limit is not None:
                limit(threads)
        self.path = path
        self.vocab_size, positions, _ = read_facts(path)
        self.context = min(context or positions, positions)
        try:
            self._program: Any = Engine.get().load_program(path)
            self._forward: Any = self._program.load_method("forward")
        except RuntimeError as error:
            raise UserError(f"ExecuTorch cannot load {path}: {error}") from error
        beside = path.with_name(f"{path.name}.tokenizer")
        self.tokenizer = load_tokenizer(beside) if beside.is_dir() else None
        self._length = 0

    def clear(self) -> None:
        self._length = 0

    def read(self, ids: Sequence[int], last: int, top_k: int | None) -> Tensor:
        rows: deque[Tensor] = deque(maxlen=last)
        for id in track(ids, f"of {len(ids)} positions computed"):
            (out,) = self._forward.execute((torch.tensor([[id]]), torch.tensor([self._length])))
            self._length += 1
            rows.append(out[0].float().clone())  # the next call writes to the program's own memory
        return torch.stack(list(rows))

    def close(self) -> None:
        del self._forward, self._program
