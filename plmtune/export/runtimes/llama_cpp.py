"""GGUF files by llama.cpp, through the C interface that llama-cpp-python binds.

Its class `Llama` is not used: it copies the logits of each token into an array for the whole context, 2.5 GB for
PLM's vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.export.runtimes.gguf_facts import FLASH_ATTENTION, GgufRuntime
from plmtune.tokenizers.message import Message


class LlamaCppRuntime(GgufRuntime):
    """A llama.cpp context of one sequence."""

    name = "llama.cpp (llama_cpp)"

    def _open(self, threads: int | None, exact: bool, flash_attention: bool | None) -> None:
        path = self.path
        self._lib, _ = lib, _ = _library()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}: see that it is whole, and of a kind that llama.cpp knows.")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self._vocab))
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = self.context
        settings.flash_attn_type = getattr(lib, FLASH_ATTENTION[flash_attention])
        if threads is not None:
            settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = lib.GGML_TYPE_F32
        self._context = lib.llama_init_from_model(self._model, settings)
        if not self._context:
            lib.llama_model_free(self._model)
            raise UserError(f"llama.cpp has no room for a context of {self.context} tokens with {path}.")
        self._length = 0

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._length = 0

    def read(self, ids: Sequence[int], last: int, top_k: int | None) -> Tensor:
        lib, n = self._lib, len(ids)
        batch = lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for index, id in enumerate(ids):
                batch.token[index], batch.pos[index] = id, self._length + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = index >= n - last
            code = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if code:
            raise UserError(f"llama.cpp failed on {n} tokens after {self._length} (code {code}) with {self.path}.")
        self._length += n
        logits = np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape=(last, self.vocab_size))
        return torch.from_numpy(logits.copy())

    def state_bytes(self, ids: Sequence[int]) -> int:
        self._read_anew(ids, 1, None)
        return int(self._lib.llama_state_seq_get_size(self._context, 0))

    def encode(self, text: str) -> list[int] | None:
        data = text.encode()
        ids = (self._lib.llama_token * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), True, True)
        if count < 0:
            raise UserError(f"llama.cpp cannot tokenize with {self.path}: {-count} ids for {len(data)} bytes.")
        return list(ids[:count])

    def render(self, messages: Sequence[Message]) -> str | None:
        if self._template is None:
            return None
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        eos, bos = (self._text(find(self._vocab)) for find in (self._lib.llama_vocab_eos, self._lib.llama_vocab_bos))
        formatter = Jinja2ChatFormatter(self._template, eos_token=eos, bos_token=bos)
        said: Any = [{"role": message.role, "content": message.content} for message in messages]
        prompt: str = formatter(messages=said).prompt
        return prompt

    def _text(self, id: int) -> str:
        return "" if id < 0 else str(self._lib.llama_vocab_get_text(self._vocab, id).decode())

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


@cache
def _library() -> tuple[Any, Any]:
    """The library, and its silent log callback, whose address llama.cpp keeps, so that it must live as long."""
    import llama_cpp as lib

    silence = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silence, ctypes.c_void_p(0))
    lib.llama_backend_init()
    return lib, silence
