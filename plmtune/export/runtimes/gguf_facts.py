"""What both bindings of llama.cpp share: the header of a GGUF file is read first, because llama.cpp ends the process on
some damaged files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from plmtune.errors import UserError
from plmtune.export.runtimes.base import DEFAULT_CONTEXT, InferenceRuntime
from plmtune.models.gguf_file import opened_gguf

_PREFIX = "LLAMA_FLASH_ATTN_TYPE_"
FLASH_ATTENTION = {None: f"{_PREFIX}AUTO", False: f"{_PREFIX}DISABLED", True: f"{_PREFIX}ENABLED"}


def flash_settings(path: Path) -> tuple[bool, ...]:
    """The settings of flash attention, llama.cpp's default, with which it does not abort on a file's architecture."""
    with opened_gguf(path) as file:
        return (False,) if file.metadata.get("general.architecture") == "plm" else (False, True)


class GgufRuntime(InferenceRuntime):
    """llama.cpp with one GGUF file open.

    Args:
        threads: None: llama.cpp's own choice.
        context: None: the model's, at most 4,096.
        exact: keys and values in fp32, where llama.cpp's default is fp16, and no flash attention.
        flash_attention: None: as llama.cpp chooses, where it does not abort on the architecture.
    """

    rounds_inputs = True

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None,
        context: int | None,
        exact: bool,
        flash_attention: bool | None = None,
    ) -> None:
        with opened_gguf(path) as file:
            architecture = file.metadata.get("general.architecture")
            positions = file.metadata.get(f"{architecture}.context_length")
            embedding = file.tensors.get("token_embd.weight")
            template = file.metadata.get("tokenizer.chat_template")
        if type(positions) is not int or positions < 1 or embedding is None:
            what = "token_embd.weight" if embedding is None else f"a whole {architecture}.context_length"
            raise UserError(f"{path} has no {what}: it is no model that llama.cpp runs.")
        if True not in flash_settings(path):
            if flash_attention:
                raise UserError(
                    f"{path} has the architecture {architecture}, on which llama.cpp aborts with flash attention: "
                    "leave it off."
                )
            flash_attention = False
        self.path, self.vocab_size = path, embedding.shape[0]
        self._template = template if isinstance(template, str) else None
        self.context = min(context or DEFAULT_CONTEXT, positions)
        self._open(threads, exact, False if exact else flash_attention)

    @abstractmethod
    def state_bytes(self, ids: Sequence[int]) -> int:
        """Bytes in which llama.cpp saves its cache once it has read ids."""

    @abstractmethod
    def _open(self, threads: int | None, exact: bool, flash_attention: bool | None) -> None:
        """Load `path` with room for `context` tokens."""
