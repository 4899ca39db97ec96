"""Directories in Hugging Face's form, by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.export.runtimes.base import DEFAULT_CONTEXT, InferenceRuntime
from plmtune.modules.torchtune_layers import quiet
from plmtune.tokenizers import jieba_sentencepiece, tokenizer_json
from plmtune.tokenizers.bpe import read_file
from plmtune.tokenizers.message import Message


class TransformersRuntime(InferenceRuntime):
    """A model and a tokenizer of transformers, from local files alone and without any code of theirs.

    Args:
        threads: of PyTorch, for the whole process; None: as it is.
        context: None: the model's, at most 4,096.
        exact: in fp32.
    """

    name = "transformers"

    def __init__(self, path: Path, *, threads: int | None, context: int | None, exact: bool) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.path = path
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        dtype = torch.float32 if exact else "auto"
        with _quiet(), quiet():  # it imports torchao where that is installed
            from transformers import AutoModelForCausalLM, AutoTokenizer

            try:
                model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **local)
                # transformers has no jieba, so a directory with PanGu-alpha's tokenizer has none for it.
                self._tokenizer: Any = None if _needs_jieba(path) else AutoTokenizer.from_pretrained(path, **local)
            except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"transformers cannot open {path}: {reason}") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(device).eval()
        self.vocab_size = int(self._model.config.vocab_size)
        self.context = min(context or DEFAULT_CONTEXT, int(self._model.config.max_position_embeddings))
        self._cache: Any = None

    def clear(self) -> None:
        self._cache = None

    @torch.inference_mode()
    def read(self, ids: Sequence[int], last: int, top_k: int | None) -> Tensor:
        row = torch.tensor([list(ids)], device=self._model.device)
        out = self._model(row, past_key_values=self._cache, use_cache=True, logits_to_keep=last)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[0]
        return logits

    def encode(self, text: str) -> list[int] | None:
        if self._tokenizer is None:
            return None
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def render(self, messages: Sequence[Message]) -> str | None:
        if self._tokenizer is None or self._tokenizer.chat_template is None:
            return None
        said = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return text

    def close(self) -> None:
        del self._cache, self._model


def _needs_jieba(path: Path) -> bool:
    held = path / "tokenizer.json"
    return held.is_file() and jieba_sentencepiece.is_data(tokenizer_json.load_json(read_file(held), str(held)))


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice while files are read."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
